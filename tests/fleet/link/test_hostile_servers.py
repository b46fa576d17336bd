"""Plain servers that answer without an end, in nonsense, or with what was not asked for."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from pla_serve.fleet.link.dialect import Dialect
from pla_serve.fleet.link.http import HttpLink, HttpLinkTimes
from pla_serve.fleet.link.sglang import SglangDialect
from pla_serve.fleet.link.vllm import VllmDialect
from pla_serve.wire.engine import EngineLoad
from tests.fleet.link.link_harness import FAST, Recorder, add, running

Write = Callable[[bytes], Awaitable[None]]
Page = Callable[[Write], Awaitable[None]]
MIB = 1 << 20
MOST_READ = 64 * MIB
"""Bytes that a server gets rid of before its router hangs up, whatever it does."""


def answer(content: bytes, head: str = "") -> Page:
    async def write_page(write: Write) -> None:
        length = f"Content-Length: {len(content)}\r\n"
        await write(f"HTTP/1.1 200 OK\r\n{length}{head}\r\n".encode() + content)

    return write_page


def endless(begin: str, part: bytes, pause: float = 0.0) -> Page:
    """An answer that begins so and then repeats ``part`` until the router hangs up."""

    async def write_page(write: Write) -> None:
        await write(begin.encode())
        while True:
            await write(part)
            await asyncio.sleep(pause)

    return write_page


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


OK = "HTTP/1.1 200 OK\r\n"
CHUNKED = f"{OK}Transfer-Encoding: chunked\r\n\r\n"
ZERO = bytes(1 << 16)
MODEL = {"id": "m", "max_model_len": 4096}
PAGES: dict[str, Page] = {
    "/health": answer(b""),
    "/v1/models": answer(json.dumps({"data": [MODEL]}).encode()),
    "/metrics": answer(b"process_start_time_seconds 5\n"),
    "/server_info": answer(b"{}"),
}


class RawServer:
    """A server whose every byte is a test's own; one request a connection."""

    def __init__(self, pages: dict[str, Page]) -> None:
        self.pages = {**PAGES, **pages}
        self.asked: list[str] = []
        self.sent = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def write(content: bytes) -> None:
            writer.write(content)
            self.sent += len(content)
            assert self.sent < MOST_READ, "the router reads without an end"
            await writer.drain()

        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ")[1].decode()
            self.asked.append(path)
            page = self.pages.get(path)
            if page is not None:
                await page(write)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def raw(**pages: Page) -> AsyncIterator[RawServer]:
    """A server; names of pages without the slash, ``post`` for the answers."""
    named = {"post": "/v1/completions", "models": "/v1/models", "generate": "/generate"}
    server = RawServer({named.get(name, f"/{name}"): page for name, page in pages.items()})
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


def link_to(
    server: RawServer, events: Recorder, dialect: Dialect | None = None, seconds: float = 20.0
) -> HttpLink:
    times = HttpLinkTimes(liveness=seconds, poll=0.02, backoff=FAST)
    return HttpLink(server.url, events, dialect or VllmDialect(), times=times)


ENDLESS_PAGES = {
    "a body without an end": endless(f"{OK}\r\n", ZERO),
    "a head without an end": endless(f"{OK}X: ", b"x" * 4096),
    "heads without an end": endless(OK, b"X: y\r\n" * 100),
    "chunks without an end": endless(CHUNKED, b"1\r\nx\r\n" * 999),
    "a compressed body": answer(gzip.compress(bytes(MIB)), "Content-Encoding: gzip\r\n"),
    "another protocol": endless("SSH-2.0-OpenSSH_9.9\r\n", ZERO),
}


@pytest.mark.parametrize("page", ["health", "models", "metrics", "server_info"])
@pytest.mark.parametrize("kind", ENDLESS_PAGES)
def test_a_page_without_an_end_is_no_page(page: str, kind: str) -> None:
    async def main() -> None:
        async with raw(**{page: ENDLESS_PAGES[kind]}) as server:
            events = Recorder()
            link = link_to(server, events, SglangDialect())
            async with running(link):
                while server.asked.count(f"/{page}".replace("/models", "/v1/models")) < 3:
                    await asyncio.sleep(0.01)
            assert not events.boots

    asyncio.run(main())


@pytest.mark.parametrize("begin", [f"{OK}\r\n", f"{OK}X-Slow: "])
def test_a_page_that_drips_takes_its_time_once(begin: str) -> None:
    async def main() -> None:
        async with raw(health=endless(begin, b"x", pause=0.01)) as server:
            link = link_to(server, Recorder(), seconds=0.2)
            async with running(link):
                while len(server.asked) < 3:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


MODELS = {
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "not JSON": b"\xff\xfe",
    "a negative context": json.dumps({"data": [{"id": "m", "max_model_len": -1}]}).encode(),
    "a huge context": json.dumps({"data": [{"id": "m", "max_model_len": 10**30}]}).encode(),
    "no name": json.dumps({"data": [{"max_model_len": 4096}]}).encode(),
    "a number for a name": json.dumps({"data": [{"id": 7, "max_model_len": 4096}]}).encode(),
}


@pytest.mark.parametrize("kind", MODELS)
def test_nonsense_for_facts_is_no_connection_and_no_end_of_the_link(kind: str) -> None:
    async def main() -> None:
        async with raw(models=answer(MODELS[kind])) as server:
            events = Recorder()
            async with running(link_to(server, events)):
                while server.asked.count("/v1/models") < 2:
                    await asyncio.sleep(0.01)
                assert not events.boots
                server.pages["/v1/models"] = PAGES["/v1/models"]
                await events.until(lambda: events.boots)

    asyncio.run(main())


@pytest.mark.parametrize("value", ["+Inf", "NaN", "-1", "1e300"])
def test_nonsense_for_load_is_no_load(value: str) -> None:
    text = f"vllm:num_requests_running {value}\nvllm:kv_cache_usage_perc {value}\n"

    async def main() -> None:
        async with raw(metrics=answer(text.encode())) as server:
            events = Recorder()
            async with running(link_to(server, events)):
                await events.until(lambda: len(events.reports) > 2)
                assert events.reports[-1].load == EngineLoad()
                assert not events.losses

    asyncio.run(main())


def test_a_redirect_does_not_make_the_router_ask_others() -> None:
    async def main() -> None:
        async with raw() as other:
            away = f"HTTP/1.1 307 X\r\nLocation: {other.url}/metrics\r\nContent-Length: 0\r\n\r\n"

            async def redirect(write: Write) -> None:
                await write(away.encode())

            async with raw(**{"metrics": redirect, "metrics/": PAGES["/metrics"]}) as server:
                events = Recorder()
                async with running(link_to(server, events)):
                    await events.until(lambda: len(events.reports) > 1)
            assert "/metrics/" in server.asked
            assert not other.asked

    asyncio.run(main())


def test_an_error_without_an_end_is_an_error_and_its_server_remains() -> None:
    begin = "HTTP/1.1 500 X\r\n\r\nfull of "

    async def main() -> None:
        async with raw(post=endless(begin, b"woe " * 4096)) as server:
            events = Recorder()
            link = link_to(server, events)
            async with running(link):
                await events.until(lambda: events.boots)
                link.send(add("a"))
                await events.until(lambda: events.finish("a"))
                error = events.outputs("a")[-1].error or ""
                assert error.startswith("full of woe")
                assert len(error) < 600
                assert not events.losses

    asyncio.run(main())


TOKENS = {"text": "", "finish_reason": None}
STREAM = f"{OK}Content-Type: text/event-stream\r\n\r\n"
STREAMS = {
    "a line without an end": endless(STREAM, ZERO),
    "events that say nothing": endless(STREAM, event(choices=[], x="y" * 60_000)),
    "comments without an end": endless(STREAM, b": ping\n" * 9_000),
    "compressed": endless(f"{OK}Content-Encoding: gzip\r\n\r\n", gzip.compress(ZERO)),
    "more tokens than asked for": endless(
        STREAM, event(choices=[{**TOKENS, "token_ids": [1] * 9}])
    ),
    "a negative token": endless(STREAM, event(choices=[{**TOKENS, "token_ids": [-1]}])),
    "a token beyond all": endless(STREAM, event(choices=[{**TOKENS, "token_ids": [2**40]}])),
    "a token beyond all numbers": endless(
        STREAM, event(choices=[{**TOKENS, "token_ids": [2**90]}])
    ),
    "deep": endless(STREAM, b"data: " + b'{"x":' * 50_000 + b"\n"),
    "not UTF-8": endless(STREAM, b'data: {"choices":[{"text":"\xff"}]}\n'),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_that_is_none_is_a_loss(kind: str) -> None:
    async def main() -> None:
        async with raw(post=STREAMS[kind]) as server:
            events = Recorder()
            link = link_to(server, events)
            async with running(link):
                await events.until(lambda: events.boots)
                link.send(add("a"))
                await events.until(lambda: events.losses)
                assert "an answer broke off" in events.losses[0]
                await events.until(lambda: len(events.boots) == 2)

    asyncio.run(main())
