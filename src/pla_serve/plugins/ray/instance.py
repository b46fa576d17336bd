"""A replica with an engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ray import serve

from pla_serve.plugins.ray.calls import read_call
from pla_serve.plugins.ray.load import EngineAnswers, InstanceLoad
from pla_serve.plugins.ray.replicas import pack_stats
from pla_serve.server.engine.client import EngineClient
from pla_serve.server.engine.process import EngineSpec
from pla_serve.wire.codec import encode
from pla_serve.wire.engine import AbortRequest, Output, Rejected, RequestAnswer
from pla_serve.wire.link import Role

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
"""Longest time between two signs of life of a request."""


@dataclass(frozen=True, slots=True)
class InstanceOptions:
    """Settings of the replicas with engines, the same for all of them."""

    spec: EngineSpec
    """How the engine is started. Its model is looked for on the replica's node."""
    model: str
    """Name by which clients call the model."""
    silence_seconds: float
    """An engine that is silent for so long is killed and started again."""
    short: int = 0
    """So many replicas are short instances, by their rank."""
    long: int = 0
    """So many are long instances; the others are mixed."""

    def role(self, rank: int) -> Role:
        """Return the role of the replica of so high a rank, counted from 0."""
        if rank < self.short:
            return "short"
        return "long" if rank < self.short + self.long else "mixed"


class Instance:
    """One engine in a process of its own, started again when it dies. Ray calls the methods."""

    async def __init__(self, options: InstanceOptions) -> None:  # type: ignore[misc]  # Ray awaits it
        """Start the engine, and wait for it.

        Raises:
            EngineStartError: it cannot be started; the message names the cure.
        """
        self._options = options
        self._load = InstanceLoad(options.model, options.spec.config.block_tokens)
        self._engine = EngineClient(
            options.spec, self._load, silence_seconds=options.silence_seconds
        )
        self._running = asyncio.create_task(self._engine.run())
        ready = asyncio.create_task(self._engine.ready())
        await asyncio.wait({self._running, ready}, return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            ready.cancel()
            self._running.result()

    async def facts(self) -> bytes | None:
        """Return the packed facts of the engine."""
        facts = self._load.facts(self._engine.boot)
        return None if facts is None else encode(facts)

    async def generate(self, packed: bytes) -> AsyncIterator[bytes]:
        """Yield the answers to a call, an empty list now and then as a sign of life.

        Raises:
            EngineDiedError: the engine has ended.
            WireError: these are no bytes of a call.
        """
        call = read_call(packed, time.monotonic())
        id, answers, ended = call.message.id, EngineAnswers(), False
        self._engine.open_route(id, answers)
        self._load.arrived(call, time.monotonic())
        self._engine.send(call.message)
        try:
            while not ended:
                batch = await answers.next(BEAT_SECONDS)
                ended = any(_is_end(message) for message in batch)
                yield encode(batch)
        finally:
            self._engine.close_route(id)
            if not ended:
                self._engine.send(AbortRequest(id))

    def record_routing_stats(self) -> dict[str, bytes]:
        """Return what request routers go by."""
        role = self._options.role(serve.get_replica_context().rank.rank)
        now = time.monotonic()
        stats = self._load.report(role, self._engine.boot, now, time.time())
        return {} if stats is None else pack_stats(stats)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what the autoscaling policy goes by."""
        return self._load.demand(time.monotonic())

    async def check_health(self) -> None:
        """Raise, so that Ray replaces the replica, if its engine cannot be started any more.

        Raises:
            EngineStartError: it failed too often in a row.
        """
        if self._running.done():
            self._running.result()

    async def __del__(self) -> None:
        """End the engine. Ray awaits this once the replica's requests have ended."""
        await self._engine.stop()
        await asyncio.gather(self._running, return_exceptions=True)


def _is_end(message: RequestAnswer) -> bool:
    if isinstance(message, Output):
        return message.finish_reason is not None
    return isinstance(message, Rejected)
