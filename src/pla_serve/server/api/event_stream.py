"""A response of server-sent events that gives up on a client that does not read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from pla_serve.server.errors import ApiError, failed

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
        write_error: Callable[[ApiError], bytes] | None = None,
    ) -> None:
        """``write_error`` writes an error as an event; None: as OpenAI does."""
        self._write_error = write_error or _openai_event
        self._events = events
        self._on_end = on_end
        self._stall_seconds = stall_seconds
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        watch = StallWatch(self._stall_seconds)
        try:
            with watch:
                await watch.send(send, start)
                await self._send_events(watch, send)
        except StalledError:
            log.warning("a client did not read for %.0f s; its request ends", self._stall_seconds)
        finally:
            self._on_end()

    async def _send_events(self, watch: StallWatch, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for block in events:
                    await watch.send(send, _body(block, more=True))
        except Exception:
            log.exception("a stream failed")
            error = self._write_error(failed("internal error"))
            await watch.send(send, _body(error, more=True))
        await watch.send(send, _body(b"", more=False))


def _openai_event(error: ApiError) -> bytes:
    return b"data: " + msgspec.json.encode(error.body()) + b"\n\n"


class StalledError(Exception):
    """The peer took nothing for too long."""


class StallWatch:
    """Cancels the task that entered it when one of its sends waits too long, as `StalledError`.

    One timer for all sends: a timeout around each would cost as much as the send itself.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._began: float | None = None
        self._stalled = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = self._loop.call_later(self._seconds, self._look)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._timer.cancel()
        if self._stalled and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise StalledError

    async def send(self, send: Send, message: Message) -> None:
        self._began = self._loop.time()
        await send(message)
        self._began = None

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._began is None else self._began) + self._seconds
        if due <= now:
            self._stalled = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(due, self._look)


def _body(block: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": block, "more_body": more}
