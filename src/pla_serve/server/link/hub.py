"""The instance's side of its links to routers: ``/fleet/link`` and ``/fleet/instance``."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from itertools import count

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from pla_serve.server.api.guard import Keys, Traffic
from pla_serve.server.api.link_access import LinkAccess
from pla_serve.server.api.routes import ApiRoute, Operation
from pla_serve.server.engine.client import EngineClient
from pla_serve.server.errors import ApiError, invalid, json_response
from pla_serve.server.link.facts import instance_facts
from pla_serve.server.link.router_link import RouterLink
from pla_serve.wire.codec import BadMessage, WireError, instance_frames
from pla_serve.wire.engine import EngineLoad, EngineReady, EngineStats
from pla_serve.wire.link import (
    PATH,
    REPORT_SECONDS,
    SUBPROTOCOL,
    Alive,
    Drain,
    EngineLost,
    InstanceFacts,
    InstanceReport,
    Role,
    SetRole,
    ToInstance,
)

log = logging.getLogger(__name__)

ROUTER_SILENCE_SECONDS = 10.0
"""A router that says nothing for this long is taken for gone, and its link is closed."""
BAD_FRAME = 1007
BUG = 1011
TRY_LATER = 1013
CHANGE_SECONDS = 0.02
"""Shortest time between two changes of the role, or of a drain, that are reported one by one."""
TURN_MESSAGES = 32
"""Messages of one frame that are taken before the event loop does something else."""
FRAME_BYTES = 2 << 20
"""Largest frame, beside the tokens of one prompt: a frame takes no message beyond 1 MiB."""
TOKEN_BYTES = 6
"""Most bytes of a prompt's token, and of the KV that is offered for it."""
LEAST_CONTEXT = 1 << 17
"""Prompts of so many tokens fit a frame in any case, so that the engine can say why it refuses."""
CLOSE_SECONDS = 1.0
"""Longest time that a router may take to answer a close frame."""


class LinkHub:
    """Links of all routers to one instance. All methods belong to the engine client's event loop.

    While a router is linked, the engine is pinged every `REPORT_SECONDS`, and a report is sent when
    it answers. So an engine that hangs sends no reports, and routers take the instance for lost.

    Args:
        access: decides which connections may become links.
        model: name by which clients call the model.
        block_tokens: tokens in a KV block of the engine.
        role: role that is reported until a router sets another one.
    """

    def __init__(
        self,
        engine: EngineClient,
        access: LinkAccess,
        traffic: Traffic,
        *,
        model: str,
        block_tokens: int,
        role: Role,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._access = access
        log.info(access.describe())
        self._traffic = traffic
        self._model = model
        self._block_tokens = block_tokens
        self._role: Role = role
        self._draining = False
        self._clock = clock
        self._decode = instance_frames()
        self._numbers = count(1)
        self._links: set[RouterLink] = set()
        self._facts: InstanceFacts | None = None
        self._stats: EngineStats | None = None
        self._stats_at = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._change: asyncio.TimerHandle | None = None
        """Set while a change has yet to be reported."""
        self._most_frame = FRAME_BYTES + TOKEN_BYTES * LEAST_CONTEXT
        self._pinged = False
        """True from a ping until the engine has answered it."""
        self._pinged_at = 0.0
        engine.watch(self)

    def routes(self, keys: Keys | None = None) -> list[ApiRoute]:
        """The link itself, and a page of what it says for those with one of ``keys``."""

        async def instance(request: Request) -> Response:
            return json_response(self.describe())

        summary = "Facts and report of this instance, as routers get them."
        return [
            Operation("GET", "/fleet/instance", instance, summary, keys=keys),
            WebSocketRoute(PATH, self.serve),
        ]

    def describe(self) -> dict[str, object]:
        return {
            "facts": None if self._facts is None else msgspec.to_builtins(self._facts),
            "report": msgspec.to_builtins(self._report()),
            "routers": len(self._links),
            "engine_silent_seconds": self._clock() - self._pinged_at if self._pinged else 0.0,
        }

    # Events of the engine client

    def ready(self, info: EngineReady) -> None:
        self._stats = None
        self._facts = instance_facts(info, self._engine.boot, self._model, self._block_tokens)
        self._most_frame = FRAME_BYTES + TOKEN_BYTES * max(info.max_model_len, LEAST_CONTEXT)
        self._pinged = False
        self._inform()

    def stats(self, stats: EngineStats) -> None:
        self._stats = stats
        self._stats_at = self._clock()
        self._inform()

    def alive(self) -> None:
        self._pinged = False
        self._inform()

    def lost(self, reason: str) -> None:
        self._facts = None
        self._pinged = False
        for link in self._links:
            if link.has_facts:
                link.has_facts = False
                link.say(EngineLost(reason))

    def restarted(self) -> None:
        """Nothing to do: routers were told of the loss, and get facts when the engine is ready."""

    # Routers

    async def serve(self, socket: WebSocket) -> None:
        """Serve one router, until either side closes the link."""
        refusal = self._refusal(socket)
        if refusal is not None:
            await socket.send_denial_response(refusal.response())
            return
        await socket.accept(SUBPROTOCOL)
        ended: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()

        def end(code: int, reason: str) -> None:
            if not ended.done():
                ended.set_result((code, reason))

        link = RouterLink(
            next(self._numbers),
            self._engine,
            self._traffic,
            lambda reason: end(TRY_LATER, reason),
            clock=self._clock,
        )
        self._links.add(link)
        if self._beat is None:
            self._next_beat()
        who = f"{socket.client.host}:{socket.client.port}" if socket.client else "a router"
        log.info("linked to the router at %s", who)
        tasks = [
            asyncio.create_task(self._read(link, socket, end)),
            asyncio.create_task(self._write(link, socket, end)),
        ]
        for task in tasks:
            task.add_done_callback(lambda task: _report_bug(task, end))
        try:
            code, reason = await ended
            log.info("the link to the router at %s ended: %s", who, reason)
        finally:
            self._links.discard(link)
            link.close()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        await _close(socket, code, reason)

    def _refusal(self, socket: WebSocket) -> ApiError | None:
        refusal = self._access.refusal(socket.scope)
        if refusal is not None:
            return refusal
        offered = socket.scope["subprotocols"]
        if SUBPROTOCOL not in offered:
            return invalid(
                f"this instance speaks {SUBPROTOCOL}, the router {', '.join(offered) or 'nothing'};"
                " use the same version of PLA-Serve on both sides"
            )
        return None

    def _next_beat(self) -> None:
        """Ping the engine now and every `REPORT_SECONDS`, while there are links."""
        if not self._links:
            self._beat = None
            return
        self._beat = asyncio.get_running_loop().call_later(REPORT_SECONDS, self._next_beat)
        if self._facts is None:
            self._inform()
        elif not self._pinged:
            self._pinged = True
            self._pinged_at = self._clock()
            self._engine.ping()

    async def _read(
        self, link: RouterLink, socket: WebSocket, end: Callable[[int, str], None]
    ) -> None:
        try:
            while True:
                async with asyncio.timeout(ROUTER_SILENCE_SECONDS):
                    frame = await socket.receive_bytes()
                if len(frame) > self._most_frame:
                    raise WireError(f"{len(frame)} bytes, more than {self._most_frame}")
                for number, message in enumerate(self._decode(frame), 1):
                    self._handle(link, message)
                    if number % TURN_MESSAGES == 0:
                        await asyncio.sleep(0)
        except WebSocketDisconnect as error:
            end(error.code, error.reason or "the router closed it")
        except TimeoutError:
            end(TRY_LATER, f"the router was silent for {ROUTER_SILENCE_SECONDS:.0f} s")
        except WireError as error:
            end(BAD_FRAME, f"not a frame of {SUBPROTOCOL}: {error}")
        except KeyError:
            end(BAD_FRAME, f"not a frame of {SUBPROTOCOL}: text instead of bytes")

    def _handle(self, link: RouterLink, message: ToInstance | BadMessage) -> None:
        if isinstance(message, SetRole):
            self._role = message.role
            self._inform_soon()
        elif isinstance(message, Drain):
            self._draining = message.on
            self._inform_soon()
        elif isinstance(message, BadMessage):
            link.refuse(message)
        elif not isinstance(message, Alive):
            link.handle(message)

    @staticmethod
    async def _write(link: RouterLink, socket: WebSocket, end: Callable[[int, str], None]) -> None:
        try:
            while True:
                await socket.send_bytes(await link.outbox.take())
        except (WebSocketDisconnect, RuntimeError) as error:
            end(TRY_LATER, f"cannot be written to: {error}")

    def _inform_soon(self) -> None:
        """Report a change. Many of them are one report, or one router could flood the others."""
        if self._change is None:
            loop = asyncio.get_running_loop()
            self._change = loop.call_later(CHANGE_SECONDS, self._inform_of_change)

    def _inform_of_change(self) -> None:
        self._change = None
        self._inform()

    def _inform(self) -> None:
        """Send a report to all routers, and facts first to those that have none."""
        if not self._links:
            return
        report = self._report()
        for link in self._links:
            if self._facts is not None and not link.has_facts:
                link.has_facts = True
                link.say(self._facts)
            link.say(report)

    def _report(self) -> InstanceReport:
        stats = self._stats
        return InstanceReport(
            role=self._role,
            ready=self._facts is not None and not self._traffic.draining,
            draining=self._draining,
            kv_tokens=self._facts.kv_tokens if self._facts else 0,
            requests=self._traffic.in_flight,
            age=max(0.0, self._clock() - self._stats_at) if stats else 0.0,
            load=stats.load if stats else EngineLoad(),
            ends_in=self._traffic.ends_in,
        )


def _report_bug(task: asyncio.Task[None], end: Callable[[int, str], None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a link to a router failed", exc_info=error)
        end(BUG, "the instance failed; its log says more")


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    """Close the connection with a status and a reason, unless it is closed already."""
    if socket.application_state is not WebSocketState.CONNECTED:
        return
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await socket.close(code, reason[:120])
    except (TimeoutError, RuntimeError, WebSocketDisconnect):
        log.debug("the link was closed without goodbye")
