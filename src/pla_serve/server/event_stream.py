"""A response of server-sent events that gives up on a client that does not read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pla_serve.server.errors import failed

log = logging.getLogger(__name__)

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(Response):
    """Sends what ``events`` yields. ``on_end`` is called however it ends.

    The server's transport takes a bounded number of bytes and then makes a send wait; a send that
    waits longer than ``stall_seconds`` ends the response.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        on_end: Callable[[], None],
        stall_seconds: float,
        headers: dict[str, str],
    ) -> None:
        self._events = events
        self._on_end = on_end
        self._stall_seconds = stall_seconds
        super().__init__(headers={**HEADERS, **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(start)
            await self._send_events(send)
        except TimeoutError:
            log.warning("a client did not read for %.0f s; its request ends", self._stall_seconds)
        finally:
            self._on_end()

    async def _send_events(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for block in events:
                    await self._send(send, block, more=True)
        except TimeoutError:
            raise
        except Exception:
            log.exception("a stream failed")
            error = msgspec.json.encode(failed("internal error").body())
            await self._send(send, b"data: " + error + b"\n\n", more=True)
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, block: bytes, *, more: bool) -> None:
        async with asyncio.timeout(self._stall_seconds):
            await send({"type": "http.response.body", "body": block, "more_body": more})
