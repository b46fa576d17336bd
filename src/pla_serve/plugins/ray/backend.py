"""The backend of the API server that is a deployment of replicas on Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from pla_serve.fleet.router.client import fleet_facts
from pla_serve.fleet.router.prefixes import Chain
from pla_serve.fleet.router.routed_request import RoutedRequest, with_seed
from pla_serve.fleet.router.tenant_routes import TenantRoutes
from pla_serve.plugins.ray.streams import ContinuationOptions, ContinuedStream, SendCall
from pla_serve.server.engine.backend import EngineUnavailableError
from pla_serve.server.engine.session import AnswerReceiver, EngineDiedError, EngineSession
from pla_serve.wire.codec import MessageDecoder
from pla_serve.wire.engine import AddRequest, EngineReady
from pla_serve.wire.link import InstanceFacts

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Time between two looks at whether some replica answers."""
ANSWER_SECONDS = 5.0
"""Longest time that it may take to answer."""
_read_facts = MessageDecoder[InstanceFacts](InstanceFacts)


class RayBackend:
    """A `Backend`. All methods belong to one event loop.

    Args:
        ask_facts: asks any replica for its packed facts (`Instance.facts`).
        send: sends a call to the replica that the request router chooses.
        vocab_size: token ids of the model as the API knows it.
    """

    def __init__(
        self,
        ask_facts: Callable[[], Any],
        send: SendCall,
        *,
        vocab_size: int,
        options: ContinuationOptions | None = None,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._ask_facts = ask_facts
        self._send = send
        self._options = options or ContinuationOptions()
        self._vocab_size = vocab_size
        self._look_seconds = look_seconds
        self._ready = asyncio.Event()
        self._stopped = asyncio.Event()
        self._was_ready = False
        self._streams: dict[str, asyncio.Task[None]] = {}
        """Requests in flight, by id."""
        self._info: EngineReady | None = None

    @property
    def info(self) -> EngineReady | None:
        """Limits of one replica; all have the same settings."""
        return self._info

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    @property
    def status(self) -> str:
        if self._stopped.is_set():
            return "stopped"
        if self.is_ready:
            return "ready"
        return "restarting" if self._was_ready else "starting"

    async def run(self) -> None:
        """Look every few seconds whether some replica answers, until `stop`."""
        while not self._stopped.is_set():
            await self._look()
            try:
                async with asyncio.timeout(self._look_seconds):
                    await self._stopped.wait()
            except TimeoutError:
                continue

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                packed = await self._ask_facts()
        except Exception as error:  # Ray's errors have no common base for callers
            if self.is_ready:
                log.warning("no replica answers: %s", str(error) or type(error).__name__)
            self._ready.clear()
            return
        if packed is not None and not self._stopped.is_set():
            self._info = fleet_facts([_read_facts(packed)], self._vocab_size)
            self._was_ready = True
            self._ready.set()

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """End all requests; the replicas go on."""
        self._stopped.set()
        self._ready.clear()
        streams = list(self._streams.values())
        for stream in streams:
            stream.cancel()
        if streams:
            await asyncio.wait(streams, timeout=grace_seconds)

    async def ready(self) -> EngineReady:
        """Wait, without a limit, until some replica answers."""
        await self._ready.wait()
        assert self._info is not None
        return self._info

    async def wait_ready(self, seconds: float) -> EngineReady:
        """Wait until some replica answers, and return the limits of requests.

        Raises:
            EngineUnavailableError: not within ``seconds``.
        """
        try:
            async with asyncio.timeout(seconds):
                return await self.ready()
        except TimeoutError:
            raise EngineUnavailableError("no replica is ready", 5.0) from None

    def session(self, max_unread_tokens: int, tenant: str = "") -> EngineSession:
        routes = TenantRoutes(self, self._check_open, tenant)
        return EngineSession(routes, max_unread_tokens, tenant)

    def submit(self, message: AddRequest, receiver: AnswerReceiver, tenant: str) -> None:
        """Send a request to a replica, and to others if that one fails it."""
        chain = Chain(message.prompt, message.cache_scope)
        request = RoutedRequest(with_seed(message), receiver, tenant, chain)
        stream = ContinuedStream(request, self._send, self._options, time.monotonic)
        task = asyncio.get_running_loop().create_task(stream.run())
        self._streams[message.id] = task
        task.add_done_callback(lambda _: self._streams.pop(message.id, None))

    def close(self, id: str) -> None:
        """End a request, also where it runs; ids that are unknown or have ended are ignored."""
        stream = self._streams.pop(id, None)
        if stream is not None:
            stream.cancel()

    def _check_open(self) -> None:
        if self._stopped.is_set():
            raise EngineDiedError("the API's replica is shutting down")
