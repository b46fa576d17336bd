"""Event streams whose reader, or whose source, fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from pla_serve.server.api.event_stream import EventStream


async def forever() -> AsyncGenerator[bytes, None]:
    while True:
        yield b"x"
        await asyncio.sleep(0)


async def broken() -> AsyncGenerator[bytes, None]:
    yield b"data: 1\n\n"
    raise ZeroDivisionError


def run(
    events: AsyncGenerator[bytes, None],
    send: Callable[[Any], Coroutine[Any, Any, None]],
    stall_seconds: float = 60.0,
) -> list[str]:
    """Sends the stream; returns the notes of its end."""
    ended: list[str] = []

    async def main() -> None:
        stream = EventStream(
            events, on_end=lambda: ended.append("end"), stall_seconds=stall_seconds
        )
        await stream({"type": "http"}, lambda: asyncio.sleep(3600), send)  # type: ignore[arg-type]

    asyncio.run(main())
    return ended


def test_send_that_never_ends_ends_the_stream() -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 5:
            await asyncio.Event().wait()

    assert run(forever(), send, stall_seconds=0.02) == ["end"]
    assert len(sent) == 5


def test_slow_source_is_not_the_readers_fault() -> None:
    async def slow() -> AsyncGenerator[bytes, None]:
        for _ in range(5):
            await asyncio.sleep(0.02)
            yield b"x"

    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    assert run(slow(), send, stall_seconds=0.03) == ["end"]
    assert sent[-1]["more_body"] is False


def test_bug_ends_with_an_error_event() -> None:
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    assert run(broken(), send) == ["end"]
    assert b"internal error" in sent[2]["body"]
    assert b"ZeroDivision" not in sent[2]["body"]
    assert sent[-1]["more_body"] is False


def test_reader_that_vanishes_ends_the_stream() -> None:
    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    caught: list[str] = []
    try:
        run(forever(), send)
    except OSError as error:
        caught.append(str(error))
    assert caught == ["gone"]
