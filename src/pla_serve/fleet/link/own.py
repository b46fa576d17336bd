"""The link to an instance of our own: one WebSocket, kept alive, all requests over it."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from msgspec.structs import replace
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from pla_serve.fleet.link.liveness import Backoff, PeerSilence, Retries
from pla_serve.fleet.link.protocol import (
    LIVENESS_SECONDS,
    Inbound,
    InstanceFacts,
    InstanceReport,
    LinkDown,
    LinkEvents,
    LinkRefused,
    LossCause,
    Role,
)
from pla_serve.wire.codec import BadMessage, WireError, router_frames
from pla_serve.wire.engine import AddRequest, Output, Reserve
from pla_serve.wire.frames import Outbox, Overflow
from pla_serve.wire.link import (
    ALIVE_SECONDS,
    PATH,
    SUBPROTOCOL,
    Alive,
    Drain,
    EngineLost,
    FromInstance,
    SetRole,
)

log = logging.getLogger(__name__)

OPEN_SECONDS = 5.0
"""Most time for a connection and its handshake."""
CLOSE_SECONDS = 1.0
MOST_FRAME_BYTES = 16 << 20
"""Largest frame of an instance: it takes no message beyond 1 MiB, and none has more than 4 MiB."""
TURN_MESSAGES = 32
"""Messages of one frame that are taken before the event loop does something else."""
MOST_UNSENT_BYTES = 256 << 20
"""Bytes that may wait for an instance that does not read; far more than any prompt takes."""


class InstanceLink:
    """Link to an instance of ours; see `Link`.

    Args:
        url: URL of the instance, ``http://host:port`` or ``https://…``.
        events: told what happens, on the event loop that `run` is awaited on.
        api_key: link key of the instance.
        liveness_seconds: silence after which the instance counts as lost. It has to be more than
            one layer of a prefill takes there: that is how often an engine takes its messages.
        clock: monotonic, the one of `AddRequest.arrival`.

    Raises:
        ValueError: the URL has another scheme.
    """

    def __init__(
        self,
        url: str,
        events: LinkEvents,
        *,
        api_key: str | None = None,
        liveness_seconds: float = LIVENESS_SECONDS,
        backoff: Backoff | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        scheme, _, rest = url.rstrip("/").partition("://")
        if scheme not in ("http", "https") or not rest:
            raise ValueError(f"an instance is named by http://HOST:PORT, not {url!r}")
        self._url = f"{scheme}://{rest}"
        self._address = f"{'wss' if scheme == 'https' else 'ws'}://{rest}{PATH}"
        self._events = events
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._liveness = liveness_seconds
        self._clock = clock
        self._decode = router_frames()
        self._outbox: Outbox | None = None
        self._opening: asyncio.Future[ClientConnection] | None = None
        self._ended: asyncio.Future[tuple[str, LossCause]] | None = None
        self._closing = asyncio.Event()
        self._role: Role | None = None
        self._drain: bool | None = None
        """Drain that was asked for and that no report has confirmed."""
        self._retries = Retries(self._url, backoff or Backoff(), self._closing)
        self._facts: InstanceFacts | None = None
        self._report: InstanceReport | None = None
        self._connected = False

    @property
    def url(self) -> str:
        return self._url

    @property
    def connected(self) -> bool:
        return self._connected

    @property
    def facts(self) -> InstanceFacts | None:
        return self._facts

    @property
    def last_report(self) -> InstanceReport | None:
        return self._report

    def send(self, message: Inbound) -> None:
        if not self._connected or self._outbox is None:
            raise LinkDown(f"there is no connection to {self._url}")
        if isinstance(message, AddRequest):
            message = self._timed(message)
        elif isinstance(message, Reserve):
            message = replace(message, request=self._timed(message.request))
        try:
            self._outbox.put(message)
        except Overflow as error:
            reason = f"{self._url} does not read: {error}"
            self._end(reason)
            raise LinkDown(reason) from None

    def set_role(self, role: Role) -> None:
        self._role = role
        self._ask(SetRole(role))

    def drain(self, on: bool) -> None:
        self._drain = on
        self._ask(Drain(on))

    async def run(self) -> None:
        while not self._closing.is_set():
            reason = await self._live()
            if not self._closing.is_set():
                await self._retries.pause(reason)

    async def close(self) -> None:
        self._closing.set()
        if self._opening is not None:
            self._opening.cancel()
        self._end("this router closed the link")

    async def _live(self) -> str:
        """Serve one connection from start to end; return why it ended."""
        self._opening = asyncio.ensure_future(self._open())
        try:
            socket = await self._opening
        except asyncio.CancelledError:
            if not self._opening.cancelled() or not self._closing.is_set():
                raise
            return "this router closed the link"
        except InvalidStatus as error:
            return self._refused(error)
        except (OSError, TimeoutError, InvalidHandshake) as error:
            return f"cannot connect: {str(error) or type(error).__name__}"
        if socket.subprotocol != SUBPROTOCOL:
            socket.transport.abort()
            raise LinkRefused(f"{self._url} does not speak {SUBPROTOCOL}")
        self._outbox = Outbox(MOST_UNSENT_BYTES)
        ended: asyncio.Future[tuple[str, LossCause]] = asyncio.get_running_loop().create_future()
        self._ended = ended
        if self._role is not None:
            self._ask(SetRole(self._role))
        if self._drain is not None:
            self._ask(Drain(self._drain))
        silence = PeerSilence(self._liveness, self._clock())
        tasks = [
            asyncio.create_task(work)
            for work in (self._read(socket, silence), self._write(socket), self._watch(silence))
        ]
        for task in tasks:
            task.add_done_callback(self._done)
        reason, cause = "the link was cancelled", LossCause.BROKEN
        try:
            reason, cause = await ended
        finally:
            self._outbox = None
            self._lose(reason, cause)
            for task in tasks:
                task.cancel()
            try:
                await asyncio.wait(tasks)
                await self._say_goodbye(socket)
            finally:
                socket.transport.abort()  # also where this task is cancelled meanwhile
        return reason

    async def _open(self) -> ClientConnection:
        return await connect(
            self._address,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            additional_headers=self._headers,
            compression=None,
            proxy=None,
            open_timeout=OPEN_SECONDS,
            close_timeout=CLOSE_SECONDS,
            ping_interval=None,
            max_size=MOST_FRAME_BYTES,
        )

    def _refused(self, error: InvalidStatus) -> str:
        """Return why a server refused that may admit this router later.

        Raises:
            LinkRefused: the server will not change its mind.
        """
        response = error.response
        said = f"HTTP {response.status_code}"
        with suppress(ValueError, KeyError, TypeError):
            said += f", {json.loads(response.body or b'')['error']['message']}"
        if response.status_code >= 500:
            return f"refused the link: {said}"
        raise LinkRefused(
            f"{self._url} refused the link: {said}. It has to be a PLA-Serve instance of this "
            "version, and the key its link key (PLA_SERVE_LINK_KEY)."
        )

    async def _read(self, socket: ClientConnection, silence: PeerSilence) -> None:
        try:
            while True:
                frame = await socket.recv(decode=False)
                silence.heard()
                for number, message in enumerate(self._decode(frame), 1):
                    self._take(message)
                    if number % TURN_MESSAGES == 0:
                        await asyncio.sleep(0)
        except ConnectionClosed as error:
            reason = error.rcvd.reason if error.rcvd is not None else ""
            self._end(f"the instance closed the connection{': ' if reason else ''}{reason}")
        except WireError as error:
            self._end(f"not a frame of {SUBPROTOCOL}: {error}")

    def _take(self, message: FromInstance | BadMessage) -> None:
        if isinstance(message, BadMessage):
            reason = f"invalid answer of the instance: {message.reason}"
            message = Output(id=message.id, tokens=[], finish_reason="error", error=reason)
        if isinstance(message, InstanceReport):
            self._confirm(message)
            if self._connected:
                self._report = message
                self._events.report(self, message)
        elif isinstance(message, InstanceFacts):
            self._lose("the engine was replaced", LossCause.ENDED)
            self._facts = message
            self._connected = True
            self._retries.connected()
            log.info("linked to %s", self._url)
            self._events.connected(self, message)
        elif isinstance(message, EngineLost):
            self._lose(message.reason, LossCause.ENDED)
        elif self._connected:
            self._events.message(self, message)

    async def _write(self, socket: ClientConnection) -> None:
        outbox = self._outbox
        assert outbox is not None
        try:
            while True:
                await socket.send(await outbox.take())
        except ConnectionClosed:
            pass  # the reader says why

    async def _watch(self, silence: PeerSilence) -> None:
        """Send the router's heartbeats, and end the link when those of the instance stay away."""
        alive_at = self._clock()
        while True:
            await asyncio.sleep(silence.interval)
            now = self._clock()
            if silence.tick(now):
                self._end(f"nothing was heard for {silence.seconds:g} s", LossCause.SILENT)
                return
            if now >= alive_at:
                alive_at = now + ALIVE_SECONDS
                self._ask(Alive())

    def _confirm(self, report: InstanceReport) -> None:
        if report.role == self._role:
            self._role = None
        if report.draining == self._drain:
            self._drain = None

    def _ask(self, message: SetRole | Drain | Alive) -> None:
        if self._outbox is not None:
            try:
                self._outbox.put(message)
            except Overflow as error:
                self._end(f"{self._url} does not read: {error}")

    def _timed(self, request: AddRequest) -> AddRequest:
        """Return the request with times relative to now, because two machines' clocks differ."""
        now, deadline = self._clock(), request.deadline
        return replace(
            request,
            arrival=request.arrival - now,
            deadline=None if deadline is None else deadline - now,
        )

    def _done(self, task: asyncio.Task[None]) -> None:
        """A bug in one of the tasks, or in the owner's events, must not leave the link mute."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: the link failed", self._url, exc_info=error)
            self._end(f"the link failed: {error!r}")

    def _end(self, reason: str, cause: LossCause = LossCause.BROKEN) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result((reason, cause))

    def _lose(self, reason: str, cause: LossCause) -> None:
        if self._connected:
            self._connected = False
            self._report = None
            level = logging.INFO if self._closing.is_set() else logging.WARNING
            log.log(level, "lost %s: %s", self._url, reason)
            self._events.lost(self, reason, cause)

    async def _say_goodbye(self, socket: ClientConnection) -> None:
        """Close the connection politely, unless requests wait to be moved elsewhere."""
        if self._closing.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await socket.close()
