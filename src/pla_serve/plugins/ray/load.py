"""Keeps what a replica knows of its engine, and answers on their way out."""

from __future__ import annotations

import asyncio

from pla_serve.plugins.ray.calls import SentCall
from pla_serve.plugins.ray.replicas import ReplicaStats
from pla_serve.policy.pools.rates import WorkRate
from pla_serve.server.link.facts import instance_facts
from pla_serve.wire.engine import EngineReady, EngineStats, RequestAnswer
from pla_serve.wire.link import InstanceFacts, InstanceReport, Role
from pla_serve.wire.statistics import EngineLoad

RATE_SECONDS = 30.0
"""Time over which the rate at which work arrives is measured."""


class InstanceLoad:
    """Facts, load and arrivals of one engine; an observer of the engine client."""

    def __init__(self, model: str, block_tokens: int) -> None:
        self._model = model
        self._block_tokens = block_tokens
        self._info: EngineReady | None = None
        self._up = False
        self._load = EngineLoad()
        self._rates = {True: WorkRate(RATE_SECONDS), False: WorkRate(RATE_SECONDS)}
        """Rates of short requests (True) and of the others (False)."""

    def facts(self, boot: str) -> InstanceFacts | None:
        """Return the facts of the engine, as last known; None before it was ever ready."""
        if self._info is None:
            return None
        return instance_facts(self._info, boot, self._model, self._block_tokens)

    def report(self, role: Role, boot: str, now: float, wall: float) -> ReplicaStats | None:
        """Return what routers go by; None before the engine has ever been ready."""
        facts = self.facts(boot)
        if facts is None:
            return None
        report = InstanceReport(
            role=role, ready=self._up, draining=False, kv_tokens=facts.kv_tokens, load=self._load
        )
        return ReplicaStats(facts, report, wall)

    def demand(self, now: float) -> dict[str, float]:
        """Return arrivals and backlogs of both classes, and the share of KV in use."""
        return {
            "short_rate": self._rates[True].close(now),
            "long_rate": self._rates[False].close(now),
            "short_backlog": self._load.queued_short_seconds,
            "long_backlog": self._load.queued_long_seconds,
            "kv_usage": self._load.kv_usage,
        }

    def arrived(self, call: SentCall, now: float) -> None:
        """Count a request."""
        self._rates[call.short].add(call.seconds, now)

    # Events of the engine client

    def ready(self, info: EngineReady) -> None:
        """Keep the facts of a new life of the engine."""
        self._info, self._up, self._load = info, True, EngineLoad()

    def stats(self, stats: EngineStats) -> None:
        """Keep the newest load."""
        self._load = stats.load

    def alive(self) -> None:
        """Do nothing: the client has heard it."""

    def lost(self, reason: str) -> None:
        """Note that nothing can be sent until `ready`."""
        self._up, self._load = False, EngineLoad()

    def restarted(self) -> None:
        """Do nothing: `ready` follows."""


class EngineAnswers:
    """Keeps the engine's answers to one request until they are taken; an `AnswerReceiver`."""

    def __init__(self) -> None:
        self._waiting: list[RequestAnswer] = []
        self._failure: Exception | None = None
        self._event = asyncio.Event()

    def take(self, message: RequestAnswer) -> None:
        """Keep an answer."""
        self._waiting.append(message)
        self._event.set()

    def fail(self, failure: Exception) -> None:
        """Have `next` raise after what has come."""
        self._failure = failure
        self._event.set()

    async def next(self, seconds: float) -> list[RequestAnswer]:
        """Return the answers since the last call; none after so many seconds without one.

        Raises:
            EngineDiedError: the engine has ended.
        """
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return []
        self._event.clear()
        waiting, self._waiting = self._waiting, []
        if not waiting and self._failure is not None:
            raise self._failure
        if self._failure is not None:
            self._event.set()
        return waiting
