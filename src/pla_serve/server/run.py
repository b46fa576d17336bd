"""Runs an API server from its start to its drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from pla_serve.server.api.app import build_app
from pla_serve.server.api.guard import Traffic
from pla_serve.server.api.link_access import LinkAccess, operator_keys
from pla_serve.server.api.logprobs import TokenNames
from pla_serve.server.api.prompts import PromptEncoder
from pla_serve.server.api.routes import ApiRoute, Operation
from pla_serve.server.api.service import Service
from pla_serve.server.connections.acceptor import Acceptor
from pla_serve.server.connections.descriptors import RESERVED, raise_limit
from pla_serve.server.connections.protocol import BoundedHttp
from pla_serve.server.connections.registry import ConnectionRegistry, is_loopback
from pla_serve.server.engine.backend import Backend, EngineStartError
from pla_serve.server.engine.client import EngineClient
from pla_serve.server.engine.process import EngineProcess, EngineSpec
from pla_serve.server.generation.detokenize import TokenBytes
from pla_serve.server.link.hub import LinkHub
from pla_serve.server.loop_lag import LoopLag
from pla_serve.server.model import ServedModel
from pla_serve.server.offline.operations import offline_operations
from pla_serve.server.offline.service import OfflineService
from pla_serve.server.offline.store import FolderError
from pla_serve.server.page.instance_view import InstancePageView
from pla_serve.server.page.operations import PageView, page_operations
from pla_serve.server.reasoning.support import ReasoningSupport, check_together
from pla_serve.server.records.journal import Journals, LogJournal
from pla_serve.server.records.metrics import Metrics
from pla_serve.server.records.tracing import configured, open_tracing
from pla_serve.server.settings import ServerSettings
from pla_serve.server.tools.support import ToolSupport

log = logging.getLogger(__name__)

ABORT_SECONDS = 2.0
"""Time for the last events of requests that the drain has ended."""
COLLECT_AFTER = (20_000, 20, 20)
"""Thresholds of Python's garbage collector: requests make no cycles worth looking for sooner."""
SWITCH_SECONDS = 0.001
"""Time after which a thread that decodes or renders gives way to the loop; Python's is 5 ms."""
MOST_FRAME_BYTES = 64 * 2**20
"""Largest frame of a link; a prompt of a million tokens takes some 5 MB."""


def listen(host: str, port: int, descriptor: int | None = None) -> socket.socket:
    """A listening socket, taken before a model is loaded so that a busy port costs no wait.

    Connections inherit its settings: peers that vanished are found by keep-alive probes, and those
    that take no data for two minutes are dropped by the kernel.

    Args:
        descriptor: of a socket that another process made with this function and holds as well.

    Raises:
        OSError: the address cannot be had; the message says which.
    """
    if descriptor is not None:
        return socket.socket(fileno=descriptor)
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


class DrainingServer(uvicorn.Server):
    """uvicorn with bounded connections. The first signal drains and the second one quits."""

    def __init__(
        self, config: uvicorn.Config, drain: Callable[[], None], connections: ConnectionRegistry
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._connections = connections
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining = False
        self.quit_by: int | None = None
        """Signal that ended the server at once, or None."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept on ``sockets``, in place of uvicorn's own way, which has no bounds."""
        most = raise_limit() - RESERVED

        def make() -> BoundedHttp:
            return BoundedHttp(self.config, self.server_state, {}, self._connections)

        self.servers = [
            Acceptor(listener, make, most=most, make_room=self._connections.evict)  # type: ignore[misc]
            for listener in sockets or ()
        ]
        self.started = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        assert self._loop is not None
        if not self._draining:
            self._draining = True
            self._loop.call_soon_threadsafe(self._drain)
        else:
            self.quit_by = sig
            self.should_exit = self.force_exit = True


class ApiServer:
    """The API in front of ``backend``, and its end. `run` serves; `stop` is what SIGTERM does.

    Where another process holds the listening socket as well (``settings.listen_fd``), a draining
    server leaves new connections to its successor, instead of refusing their requests.

    Args:
        backend: ends with this server.
        view: what the page at ``/ui`` shows of it.
        on_ready: called once, when the backend is ready for the first time.
        more_routes: returns routes of its own; called once `traffic` is there.
    """

    def __init__(
        self,
        settings: ServerSettings,
        backend: Backend,
        metrics: Metrics,
        model: ServedModel,
        *,
        view: PageView,
        on_ready: Callable[[], None] = lambda: None,
        more_routes: Callable[[], Sequence[ApiRoute]] = tuple,
    ) -> None:
        self._settings = settings
        self._shared_listener = settings.listen_fd is not None
        self._backend = backend
        self._on_ready = on_ready
        self.metrics = metrics
        self.traffic = Traffic(metrics)
        self.encoder = PromptEncoder(model.tokenizer, chat_template=model.chat_template)
        token_bytes = TokenBytes(model.tokenizer)
        self._tracing = (
            open_tracing(settings.otlp_endpoint, "pla-serve")
            if configured(settings.otlp_endpoint)
            else None
        )
        tools, reasoning = self._answer_formats(model)
        self.service = service = Service(
            settings=settings,
            engine=backend,
            token_bytes=token_bytes,
            encoder=self.encoder,
            names=TokenNames(token_bytes),
            metrics=metrics,
            check_grammar=model.check_grammar,
            tools=tools,
            reasoning=reasoning,
            defaults=model.defaults,
            embeddings=model.embeddings,
            journal=Journals([LogJournal(), *([self._tracing] if self._tracing else [])]),
            started=int(time.time()),
        )
        pages = page_operations(service, self.traffic, view)
        self.app = build_app(service, self.traffic, more_routes(), pages)
        config = _uvicorn_config(self.app, settings)
        self.connections = ConnectionRegistry(settings.limits)
        self.http = DrainingServer(config, self.stop, self.connections)
        self._drain_task: asyncio.Task[None] | None = None

    def _answer_formats(self, model: ServedModel) -> tuple[ToolSupport, ReasoningSupport]:
        template, settings = self.encoder.tool_template, self._settings
        try:
            tools = ToolSupport(model.tokenizer, template, settings.tool_parser)
            reasoning = ReasoningSupport(model.tokenizer, template, settings.reasoning_parser)
            check_together(reasoning, tools.format.name)
            return tools, reasoning
        except ValueError as error:
            raise EngineStartError(str(error)) from None

    async def run(self, listener: socket.socket) -> int:
        """Serve until `stop`.

        Returns:
            The exit status.

        Raises:
            EngineStartError: the backend cannot be started; the message names the cure.
        """
        self._warn_if_open(listener)
        self.lag = LoopLag(self.metrics.loop_lag)
        self.lag.start()
        backend = asyncio.create_task(self._backend.run())
        http = asyncio.create_task(self.http.serve([listener]))
        announce = asyncio.create_task(self._announce())
        try:
            await asyncio.wait({backend, http}, return_when=asyncio.FIRST_COMPLETED)
            if backend.done():
                self.http.should_exit = True
                await http
                backend.result()
            await http
        finally:
            announce.cancel()
            await self._end(backend)
            self.lag.stop()
        return 0 if self.http.quit_by is None else 128 + self.http.quit_by

    async def run_for(self, work: Callable[[ASGIApp], Awaitable[None]]) -> None:
        """Start the backend, call ``work`` with the application, and end; nobody listens.

        Raises:
            EngineStartError: the backend cannot be started, or died for good.
        """
        backend = asyncio.create_task(self._backend.run())
        announce = asyncio.create_task(self._announce())
        working = asyncio.ensure_future(work(self.app))
        try:
            await asyncio.wait({backend, working}, return_when=asyncio.FIRST_COMPLETED)
            if backend.done():
                backend.result()
            await working
        finally:
            announce.cancel()
            working.cancel()
            await asyncio.wait({working})
            await self._end(backend)

    def stop(self) -> None:
        """Drain, then end `run`. To be called on the event loop."""
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())

    def _warn_if_open(self, listener: socket.socket) -> None:
        host = str(listener.getsockname()[0])
        if not self._settings.api_keys and not is_loopback(host):
            log.warning(
                "anybody who reaches %s may use this server: it has no API keys. Set "
                "PLA_SERVE_API_KEY or --api-key, or listen on 127.0.0.1 only (docs/security.md)",
                host,
            )

    async def _drain(self) -> None:
        seconds = self._settings.drain_seconds
        count = self.traffic.in_flight
        if self._shared_listener:
            for server in self.http.servers:
                server.close()
        if count:
            log.info("draining: up to %.0f s for %d running requests", seconds, count)
        if not await self.traffic.drain(seconds):
            log.warning("ending %d requests that are still running", self.traffic.in_flight)
            await self._backend.stop()
            await self.traffic.drain(ABORT_SECONDS)
        self.http.config.timeout_graceful_shutdown = int(ABORT_SECONDS)
        self.http.should_exit = True

    async def _announce(self) -> None:
        await self._backend.ready()
        self._on_ready()

    async def _end(self, backend: asyncio.Task[None]) -> None:
        if self.http.quit_by is not None:
            backend.cancel()  # kills the engine's process
        else:
            await self._backend.stop()
        with suppress(asyncio.CancelledError, EngineStartError):
            await backend
        self.encoder.close()
        if self._tracing is not None:
            self._tracing.close()


class InstanceServer(ApiServer):
    """The API in front of one engine, which it starts."""

    def __init__(
        self,
        settings: ServerSettings,
        spec: EngineSpec,
        model: ServedModel,
        *,
        on_ready: Callable[[EngineClient], None] = lambda engine: None,
        child: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """``child`` is a process of `spawn` in which the engine starts for the first time."""
        metrics = Metrics(settings.model_names[0])
        self._offline: OfflineService | None = None
        self.engine = EngineClient(
            spec,
            metrics,
            start=_starter(child),
            silence_seconds=settings.limits.engine_silence_seconds,
        )
        view = InstancePageView()
        self.engine.watch(view)
        super().__init__(
            settings,
            self.engine,
            metrics,
            model,
            view=view,
            on_ready=lambda: on_ready(self.engine),
            more_routes=lambda: [
                *self._link_routes(spec.config.block_tokens),
                *self._offline_routes(),
            ],
        )

    async def run(self, listener: socket.socket) -> int:
        """As `ApiServer.run`, with the offline batches of ``settings.offline``."""
        if self._offline is None:
            return await super().run(listener)
        async with self._offline.serving(self.app):
            return await super().run(listener)

    def stop(self) -> None:
        """As `ApiServer.stop`; a drain does not wait for lines, which the next server runs."""
        if self._offline is not None:
            self._offline.stop()
        super().stop()

    def _offline_routes(self) -> list[Operation]:
        """Return the routes of files and batches.

        Raises:
            EngineStartError: their folder cannot be used.
        """
        if self._settings.offline.batch_dir is None:
            return offline_operations(None)
        try:
            self._offline = OfflineService(self._settings, self.engine, self.metrics)
        except FolderError as error:
            raise EngineStartError(str(error)) from None
        return self._offline.operations

    def _link_routes(self, block_tokens: int) -> list[ApiRoute]:
        """Return the routes over which routers connect."""
        settings = self._settings
        hub = LinkHub(
            self.engine,
            LinkAccess(settings.link_key, settings.api_keys),
            self.traffic,
            model=settings.model_names[0],
            block_tokens=block_tokens,
            role=settings.role,
        )
        return hub.routes(operator_keys(settings.link_key, settings.api_keys))


def _uvicorn_config(app: Any, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        lifespan="off",
        ws="websockets-sansio",
        ws_max_size=MOST_FRAME_BYTES,
        ws_ping_interval=None,  # links have heartbeats of their own
        ws_per_message_deflate=False,
        timeout_keep_alive=math.ceil(settings.limits.idle_seconds),
        server_header=False,
        proxy_headers=False,  # nothing here asks where a request comes from
    )


def _starter(child: subprocess.Popen[bytes] | None) -> Callable[..., EngineProcess]:
    spare = [child]

    def start(spec: EngineSpec, **callbacks: Any) -> EngineProcess:
        return EngineProcess(spec, child=spare.pop() if spare else None, **callbacks)

    return start


def run(server: Callable[[], ApiServer], listener: socket.socket) -> int:
    """Run a server on a new event loop, uvloop's where it is installed.

    Args:
        server: makes the server on that loop, to which its parts belong.
    """

    async def main() -> int:
        return await server().run(listener)

    # What has been imported stays: no collection need go through it again, which takes the event
    # loop tens of milliseconds each time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)
    sys.setswitchinterval(SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
