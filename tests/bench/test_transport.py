"""The HTTP client against servers that write exactly these bytes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.bench.client import TimedRequest, exchange
from pla_serve.bench.transport import HttpTransport

Use = Callable[[HttpTransport], Awaitable[Any]]


class Bytes:
    """Answers every request with ``portions``; ends the connection after ``answers`` of them."""

    def __init__(self, *portions: bytes, answers: int = 1) -> None:
        self.portions, self.answers = portions, answers
        self.connections = 0
        self.requests: list[bytes] = []
        self.handlers: set[asyncio.Task[None] | None] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.handlers.add(asyncio.current_task())
        try:
            for _ in range(self.answers):
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
                self.requests.append(head + await reader.readexactly(length))
                for portion in self.portions:
                    writer.write(portion)
                    await writer.drain()
                    await asyncio.sleep(0)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            await ended(writer)


async def ended(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def against(server: Bytes, use: Use, **options: Any) -> Any:
    async def main() -> Any:
        listener = await asyncio.start_server(server, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        transport = HttpTransport(f"http://127.0.0.1:{port}/v1", **options)
        try:
            return await use(transport)
        finally:
            await transport.close()
            listener.close()
            await asyncio.gather(*(task for task in server.handlers if task))

    return asyncio.run(main())


async def post(transport: HttpTransport) -> tuple[int, bytes]:
    async with transport.post("/v1/x", b"{}") as (status, portions):
        return status, b"".join([portion async for portion in portions])


async def timed(transport: HttpTransport) -> TimedRequest:
    result = TimedRequest()
    await exchange(transport, "/v1/x", b"{}", asyncio.get_running_loop().time, result)
    return result


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"6\r\nhello \r\n5;a=b\r\nworld\r\n0\r\n\r\n"
)
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, len(CHUNKED) - 1), max_size=8, unique=True))
def test_chunks_do_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(CHUNKED)]
    portions = [CHUNKED[a:b] for a, b in itertools.pairwise(edges)]
    assert against(Bytes(*portions), post) == (200, b"hello world")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (SIZED, (200, b"hello")),
        (b"HTTP/1.1 429 Too Many\r\nContent-Length: 2\r\n\r\nno", (429, b"no")),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end", (200, b"to the end")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED, (200, b"hello")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
    ],
)
def test_framing(answer: bytes, found: tuple[int, bytes]) -> None:
    assert against(Bytes(answer), post) == found


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 O",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello",
        CHUNKED[:-5],
        b"SSH-2.0-OpenSSH_9.6\r\n",
    ],
)
def test_broken_answers_are_connection_failures(answer: bytes) -> None:
    assert against(Bytes(answer), timed).error == "connection"


def test_what_was_sent() -> None:
    server = Bytes(SIZED)
    against(server, post, api_key="sk-1")
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/x HTTP/1.1"
    assert b"authorization: Bearer sk-1" in lines
    assert b"content-length: 2" in lines
    assert body == b"{}"


def test_connections_are_kept_and_not_shared() -> None:
    async def use(transport: HttpTransport) -> None:
        await post(transport)
        await post(transport)
        await asyncio.gather(post(transport), post(transport))

    server = Bytes(SIZED, answers=99)
    against(server, use)
    assert len(server.requests) == 4
    assert server.connections == 2


def test_a_connection_that_the_server_closed_is_not_used_again() -> None:
    async def use(transport: HttpTransport) -> list[Any]:
        found = [await post(transport)]
        for _ in range(20):
            await asyncio.sleep(0)  # the end of the stream is an event of its own
        return [*found, await post(transport)]

    server = Bytes(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx")
    assert against(server, use) == [(200, b"x")] * 2
    assert server.connections == 2


class ClosesLater(Bytes):
    """Answers one request on each connection, and closes it when the next one has come."""

    def __init__(self, *portions: bytes, rest: bytes = b"") -> None:
        super().__init__(*portions)
        self.rest = rest

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.handlers.add(asyncio.current_task())
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await self._take(reader)
            writer.write(b"".join(self.portions))
            await self._take(reader)
            writer.write(self.rest)
        await ended(writer)

    async def _take(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        self.requests.append(head + await reader.readexactly(length))


def test_a_kept_connection_that_ends_without_an_answer_is_replaced_once() -> None:
    async def use(transport: HttpTransport) -> list[Any]:
        return [await post(transport) for _ in range(3)]

    server = ClosesLater(SIZED)
    assert against(server, use) == [(200, b"hello")] * 3
    assert server.connections == 3
    assert len(server.requests) == 5  # the second and the third came twice


def test_a_request_that_was_being_answered_is_not_sent_again() -> None:
    async def use(transport: HttpTransport) -> list[str | None]:
        return [(await timed(transport)).error, (await timed(transport)).error]

    server = ClosesLater(SIZED, rest=b"HTTP/1.1 200 O")
    assert against(server, use)[1] == "connection"
    assert len(server.requests) == 2


def test_a_fresh_connection_that_ends_is_a_failure() -> None:
    server = Bytes(b"")
    assert against(server, timed).error == "connection"
    assert len(server.requests) == 1


def test_a_server_that_never_answers_is_a_timeout() -> None:
    class Mute(Bytes):
        async def __call__(self, reader: Any, writer: asyncio.StreamWriter) -> None:
            self.handlers.add(asyncio.current_task())
            with suppress(ConnectionError):
                await reader.read()
            await ended(writer)

    assert against(Mute(), timed, timeout=0.05).error == "timeout"


def test_nobody_listens() -> None:
    async def main() -> TimedRequest:
        listener = await asyncio.start_server(Bytes(), "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        listener.close()
        await listener.wait_closed()
        return await timed(HttpTransport(f"http://127.0.0.1:{port}"))

    assert asyncio.run(main()).error == "connection"


def test_get() -> None:
    async def use(transport: HttpTransport) -> Any:
        return await transport.get("/v1/models")

    answer = b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}'
    assert against(Bytes(answer), use) == {"a": 1}
    with pytest.raises(OSError, match="status 404"):
        against(Bytes(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n"), use)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", ""])
def test_bad_urls(url: str) -> None:
    with pytest.raises(ValueError, match="a server's URL is like"):
        HttpTransport(url)
