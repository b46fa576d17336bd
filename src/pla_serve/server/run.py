"""Runs one server from start to drain."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn

from pla_serve.server.app import build_app
from pla_serve.server.detokenize import TokenBytes
from pla_serve.server.endpoints import GrammarCheck, Service
from pla_serve.server.engine_client import EngineClient, EngineStartError
from pla_serve.server.engine_process import EngineProcess, EngineSpec
from pla_serve.server.guard import Traffic
from pla_serve.server.logprobs import TokenNames
from pla_serve.server.metrics import Metrics
from pla_serve.server.prompts import PromptEncoder
from pla_serve.server.settings import ServerSettings

log = logging.getLogger(__name__)

ABORT_SECONDS = 2.0
"""How long requests that the drain ended may take to say so."""
KEEP_ALIVE_SECONDS = 30
"""How long an idle connection is kept."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before a model is loaded so that a busy port costs no wait.

    Connections inherit its settings: peers that vanished are found by keep-alive probes, and those
    that take no data for two minutes are dropped by the kernel.

    Raises:
        OSError: the address cannot be had; the message says which.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. "
            "Choose another with --host and --port."
        ) from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_USER_TIMEOUT", 120_000)):
        if hasattr(socket, option):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return listener


class Server(uvicorn.Server):
    """uvicorn, but the first signal drains and the second one quits."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = False
        self.quit_by: int | None = None
        """The signal that ended the server without waiting."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        assert self._loop is not None
        if not self._draining:
            self._draining = True
            self._loop.call_soon_threadsafe(self._drain)
        else:
            self.quit_by = sig
            self.should_exit = self.force_exit = True


class Instance:
    """One server: engine, application and their end. Use `run`; `stop` is what SIGTERM does."""

    def __init__(
        self,
        settings: ServerSettings,
        spec: EngineSpec,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        check_grammar: GrammarCheck,
        on_ready: Callable[[EngineClient], None] = lambda engine: None,
        child: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """``child``: of `spawn`, for the engine's first life."""
        self._settings = settings
        self._on_ready = on_ready
        self.metrics = Metrics(settings.model_names[0])
        self.traffic = Traffic(self.metrics)
        self.engine = EngineClient(spec, self.metrics, start=_starter(child))
        self.encoder = PromptEncoder(tokenizer, chat_template=chat_template)
        token_bytes = TokenBytes(tokenizer)
        service = Service(
            settings=settings,
            engine=self.engine,
            token_bytes=token_bytes,
            encoder=self.encoder,
            names=TokenNames(token_bytes),
            metrics=self.metrics,
            check_grammar=check_grammar,
            started=int(time.time()),
        )
        config = uvicorn.Config(
            build_app(service, self.traffic),
            access_log=False,
            log_config=None,
            lifespan="off",
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            server_header=False,
        )
        self.http = Server(config, self.stop)
        self._drain_task: asyncio.Task[None] | None = None

    async def run(self, listener: socket.socket) -> int:
        """Serve until told to stop. Returns the exit status.

        Raises:
            EngineStartError: the engine cannot be had; the message names the cure.
        """
        engine = asyncio.create_task(self.engine.run())
        http = asyncio.create_task(self.http.serve([listener]))
        announce = asyncio.create_task(self._announce())
        try:
            await asyncio.wait({engine, http}, return_when=asyncio.FIRST_COMPLETED)
            if engine.done():
                self.http.should_exit = True
                await http
                engine.result()
            await http
        finally:
            announce.cancel()
            await self._end(engine)
        return 0 if self.http.quit_by is None else 128 + self.http.quit_by

    def stop(self) -> None:
        """Drain, then leave `run`. Belongs to the event loop."""
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        seconds = self._settings.drain_seconds
        count = self.traffic.in_flight
        if count:
            log.info("draining: up to %.0f s for %d requests in flight", seconds, count)
        if not await self.traffic.drain(seconds):
            log.warning("ending %d requests that are still in flight", self.traffic.in_flight)
            await self.engine.stop()
            await self.traffic.drain(ABORT_SECONDS)
        self.http.config.timeout_graceful_shutdown = int(ABORT_SECONDS)
        self.http.should_exit = True

    async def _announce(self) -> None:
        await self.engine.ready()
        self._on_ready(self.engine)

    async def _end(self, engine: asyncio.Task[None]) -> None:
        if self.http.quit_by is not None:
            engine.cancel()  # kills the process
        else:
            await self.engine.stop()
        with suppress(asyncio.CancelledError, EngineStartError):
            await engine
        self.encoder.close()


def _starter(child: subprocess.Popen[bytes] | None) -> Callable[..., EngineProcess]:
    spare = [child]

    def start(spec: EngineSpec, **callbacks: Any) -> EngineProcess:
        return EngineProcess(spec, child=spare.pop() if spare else None, **callbacks)

    return start


def run(instance: Callable[[], Instance], listener: socket.socket) -> int:
    """`Instance.run` on a new event loop, uvloop's where it is installed.

    ``instance`` makes it there: its parts belong to the running loop.
    """

    async def main() -> int:
        return await instance().run(listener)

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
