"""Bounds on what a server of another kind may answer: in bytes, in lines and in time.

Such a server is a program on another machine. It may be broken, or not be what it was taken for, so
an answer without an end costs the router a bounded amount of memory and the link to this server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx

MOST_PAGE_BYTES = 1 << 20
"""Bytes of a page that is polled: health, models, metrics, facts."""
MOST_PARTS = 4096
"""Chunks of a page: each of them takes time, however short it is."""
LEAST_LINE_BYTES = 1 << 10
"""Bytes that a shorter line counts as, because each line takes time as well."""
MOST_ERROR_BYTES = 1 << 16
"""Bytes of an error that are read; what follows is dropped with the connection."""
MOST_EVENT_BYTES = 32 << 20
"""Bytes of one event, or of all without a token since the last one. The log probabilities of a
prompt are one event of up to 12 MiB (`wire.limits.MOST_PROMPT_LOGPROBS`)."""
STREAM = {"pla_serve_stream": True}
"""Extensions of a request whose answer is a stream of events, which has no bound as a whole."""


class _BoundedPage(httpx.AsyncByteStream):
    """The content of a page, which fails where it is too long or when its time is over."""

    def __init__(self, content: httpx.AsyncByteStream, end: float) -> None:
        self._content = content
        self._end = end

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = parts = 0
        try:
            async with asyncio.timeout_at(self._end):
                async for part in self._content:
                    size, parts = size + len(part), parts + 1
                    if size > MOST_PAGE_BYTES or parts > MOST_PARTS:
                        raise httpx.RemoteProtocolError(f"more than {size} bytes, {parts} parts")
                    yield part
        except TimeoutError:
            raise httpx.ReadTimeout("the answer takes too long") from None

    async def aclose(self) -> None:
        await self._content.aclose()


class BoundedTransport(httpx.AsyncBaseTransport):
    """Transport of httpx that refuses answers that are too long, too slow or compressed.

    A page is bounded in bytes, parts and time; a stream (`STREAM`) is bounded by those who read
    it. A few compressed bytes may be gigabytes, and no server needs to compress for its router.

    Args:
        inner: transport that sends the requests, and bounds the heads of answers (100 KiB).
        seconds: longest time for a page, from the request to its last byte.

    Raises:
        httpx.HTTPError: an answer is refused, when its head comes or while its content is read.
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["Accept-Encoding"] = "identity"
        stream = "pla_serve_stream" in request.extensions
        end = asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(None if stream else end):
                response = await self._inner.handle_async_request(request)
        except TimeoutError:
            raise httpx.ReadTimeout("the answer takes too long") from None
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise httpx.RemoteProtocolError("the answer is compressed, which was not asked for")
        if not stream:
            assert isinstance(response.stream, httpx.AsyncByteStream)
            response.stream = _BoundedPage(response.stream, end)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


async def read_error(response: httpx.Response, seconds: float) -> bytes:
    """Return the beginning of an error's content: what has come of it after ``seconds``."""
    content = b""
    try:
        async with asyncio.timeout(seconds):
            async for part in response.aiter_raw():
                content += part
                if len(content) > MOST_ERROR_BYTES:
                    break
    except TimeoutError:
        pass  # its begin says enough, and the connection is not used again
    return content[:MOST_ERROR_BYTES]


async def read_lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the lines of a stream without their ends.

    Raises:
        httpx.RemoteProtocolError: a line has more than `MOST_EVENT_BYTES`.
    """
    rest = bytearray()
    async for part in response.aiter_raw():
        begin = 0
        while (end := part.find(b"\n", begin)) >= 0:
            rest += part[begin:end]
            yield bytes(rest.removesuffix(b"\r"))
            rest.clear()
            begin = end + 1
        rest += part[begin:]
        if len(rest) > MOST_EVENT_BYTES:
            raise httpx.RemoteProtocolError(f"a line of more than {MOST_EVENT_BYTES} bytes")
    if rest:
        yield bytes(rest)
