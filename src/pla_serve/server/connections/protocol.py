"""uvicorn's HTTP and WebSocket protocols with bounds on what a client may send and how slowly."""

from __future__ import annotations

import asyncio
import logging
import math
from functools import partial
from http import HTTPStatus
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from pla_serve.server.connections.registry import ConnectionRegistry
from pla_serve.server.errors import ApiError, unavailable

log = logging.getLogger(__name__)

PIECE_BYTES = 16 * 2**10
"""What arrives is parsed in pieces of this size, so that bounds are looked at in between."""
MOST_HEADERS = 256
MOST_PIPELINED = 32
"""Requests that a client may send ahead of the answer to an earlier one."""
TINY_PARTS = 4096
TINY_BYTES = 32
"""A body that came in more than so many parts of less than so many bytes on average is refused:
each part costs as much time as a kilobyte."""
LINGER_SECONDS = 2.0
"""How long a client that was answered may go on sending its body."""
GRACE_SECONDS = 5.0
"""How much later than the endpoint, which answers properly, a slow body ends the connection."""
MOST_UNSENT_PONGS = 2**20
"""Bytes that may wait for a client that sends pings and does not read."""


class BoundedHttp(HttpToolsProtocol):
    """One HTTP connection.

    ``registry`` decides whether there is room for it, and closes it when it is overdue.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        registry: ConnectionRegistry,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.address = ""
        self._registry = registry
        self._limits = registry.limits
        self._in_head = True
        self._upgraded = False
        self._head_bytes = 0
        """Bytes of the head that is arriving."""
        self._field_bytes = 0
        """Bytes of its complete headers."""
        self._parts = 0
        self._body_bytes = 0
        self._beside_bytes = 0
        """Bytes since the last part of the body: a chunk's extension or the trailers."""
        self._deadline = math.inf
        self._unread_bytes = 0
        """Bytes that waited for the client when `overdue` last looked."""
        self._read_at = self.loop.time()
        """When the client was last seen to read, or had nothing to read."""
        self._refusal: ApiError | None = None
        self._refused = False
        """A body was refused: what is left of it is dropped, until its client knows."""
        self._running: RequestResponseCycle | None = None
        """The request that is being answered, or was last."""

    # What the registry asks

    def overdue(self, now: float) -> bool:
        if self.flow.read_paused:  # it is the server that makes the client wait
            self._deadline = max(self._deadline, now + self._limits.head_seconds)
        if self._upgraded:
            return False
        return self._unread_for(now) >= self._limits.idle_seconds or now >= self._deadline

    def _unread_for(self, now: float) -> float:
        """Seconds for which a complete answer has waited for a client that reads nothing.

        A stream under way has a bound of its own, for it may rest with little in the buffer.
        """
        unread = self.transport.get_write_buffer_size()
        streams = self._answering() and self.cycle.response_started
        if unread < self._unread_bytes or not unread or streams:
            self._read_at = now
            if unread:
                self._deadline = max(self._deadline, now + self._limits.idle_seconds)
        self._unread_bytes = unread
        return now - self._read_at

    def expire(self) -> None:
        if not self._in_head or self.transport.get_write_buffer_size():
            self.transport.abort()  # to close would be to wait until the client has read all
        elif self._head_bytes:
            self._refuse(ApiError(408, "the head of the request did not arrive in time"))
        else:
            self.transport.close()

    def drop(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self.transport.close()

    def release(self) -> None:
        """The connection is gone."""
        self._forget_head()
        self._registry.remove(self)

    # What the event loop calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._deadline = self.loop.time() + self._limits.head_seconds
        if not self._registry.add(self):
            self._refuse(unavailable("the server has too many connections", 1.0))

    def connection_lost(self, exc: Exception | None) -> None:
        self.release()
        self.pipeline.clear()
        if self._running is not None:  # uvicorn tells the last request of a connection only
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            if self._refused or self._upgraded or self.transport.is_closing():
                return
            self._feed(data[start : start + PIECE_BYTES])

    def _feed(self, piece: bytes) -> None:
        if self._in_head and not self._head_bytes and not self._answering():
            self._deadline = self.loop.time() + self._limits.head_seconds
        self._beside_bytes += len(piece)
        super().data_received(piece)
        if self._upgraded or self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(piece)
            self._registry.hold(len(piece))
            if self._head_bytes > self._limits.max_head_bytes:
                self._refuse(_too_large(self._limits.max_head_bytes))
        elif self._beside_bytes > self._limits.max_head_bytes:
            # The parser copies all of an unfinished trailer for each piece of it that comes.
            self.transport.abort()

    # What the parser calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._field_bytes = self._parts = self._body_bytes = self._beside_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._count(len(name) + len(value) + 4)

    def _count(self, size: int) -> None:
        self._field_bytes += size
        if self._field_bytes > self._limits.max_head_bytes or len(self.headers) > MOST_HEADERS:
            self._stop(_too_large(self._limits.max_head_bytes))

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._beside_bytes = 0
        self._forget_head()
        self._registry.began(self)
        self._deadline = self.loop.time() + self._limits.body_seconds + GRACE_SECONDS
        if len(self.pipeline) >= MOST_PIPELINED:
            self._stop(ApiError(400, "too many requests were sent ahead of their answers"))
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._parts += 1
        self._body_bytes += len(body)
        self._beside_bytes = 0
        if self._parts > TINY_PARTS and self._body_bytes < TINY_BYTES * self._parts:
            self._stop(ApiError(400, "the body came in too many small parts"))
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._deadline = math.inf if self._answering() else self._idle_until()

    # What uvicorn calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answering():
            return
        self._registry.ended(self)
        self._deadline = self._idle_until() if self._in_head else self.loop.time() + LINGER_SECONDS

    def handle_websocket_upgrade(self) -> None:
        self._upgraded = True
        self._registry.began(self)
        self.ws_protocol_class = partial(BoundedWebSocket, self)  # type: ignore[assignment]
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that cannot be parsed, or that `_stop` has stopped."""
        self._refuse(self._refusal or ApiError(400, msg))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if cycle.scope["http_version"] == "1.0":
            app = _until_close(cycle, app)
        super()._start_asgi_task(cycle, app)

    def _unsupported_upgrade_warning(self) -> None:
        """Clients offer HTTP/2 routinely; it is not worth a line in the log each time."""

    def _idle_until(self) -> float:
        return self.loop.time() + self._limits.idle_seconds

    def _answering(self) -> bool:
        """Whether a request of this connection has yet to be answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _forget_head(self) -> None:
        if self._head_bytes:
            self._registry.hold(-self._head_bytes)
            self._head_bytes = 0

    def _stop(self, refusal: ApiError) -> None:
        """Leave the parser, from within one of its callbacks."""
        self._refusal = refusal
        raise ValueError(refusal.message)

    def _refuse(self, error: ApiError) -> None:
        """Answer in place of the application, and close.

        An answer that has begun, or that is due to an earlier request, is cut off instead.
        """
        if self._answering():
            if self._in_head or self.cycle is not self._running or self.cycle.response_started:
                self.transport.abort()
                return
            self.cycle.disconnected = self._refused = True  # nobody waits for its own answer
            self.cycle.message_event.set()
            self.flow.resume_reading()
        body = msgspec.json.encode(error.body())
        head = (
            f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
            "content-type: application/json\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n"
        )
        if error.retry_after is not None:
            head += f"retry-after: {max(1, math.ceil(error.retry_after))}\r\n"
        self.transport.write(head.encode() + b"\r\n" + body)
        if self._refused:
            # To close now would be to reset a client that still sends, before it has read why.
            self.transport.write_eof()
            self._deadline = self.loop.time() + LINGER_SECONDS
        else:
            self.transport.close()


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """One WebSocket connection, which began as ``http``."""

    def __init__(self, http: BoundedHttp, **rest: Any) -> None:
        super().__init__(**rest)
        self._http = http

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.release()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.close_sent:
            self.transport.abort()  # not a handshake; uvicorn would wait for ever

    def handle_ping(self) -> None:
        if self.transport.get_write_buffer_size() > MOST_UNSENT_PONGS:
            log.warning("a WebSocket client sends pings and does not read; it is cut off")
            self.transport.abort()
            return
        super().handle_ping()

    def handle_parser_exception(self) -> None:
        """A handshake that cannot be read is refused; a bad frame ends the connection."""
        if self.conn.close_sent is not None:
            super().handle_parser_exception()
        else:
            self.transport.abort()


def _until_close(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """Have an application answer a client of HTTP/1.0, which knows no chunks.

    An answer without a length ends there where the connection does, so uvicorn is told the length
    of each part as if it were the whole.
    """
    sized = False

    async def send(message: Message) -> None:
        nonlocal sized
        if message["type"] == "http.response.start":
            sized = any(name.lower() == b"content-length" for name, _ in message["headers"])
            if not sized:
                cycle.chunked_encoding = False
        elif not sized:
            cycle.expected_content_length = len(message.get("body", b""))
        await cycle.send(message)  # type: ignore[arg-type]

    async def answer(scope: Scope, receive: Receive, _: Send) -> None:
        await app(scope, receive, send)

    return answer


def _too_large(limit: int) -> ApiError:
    return ApiError(
        431,
        f"the head of the request is larger than {limit} bytes or has more than {MOST_HEADERS} "
        "headers",
    )
