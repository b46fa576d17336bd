"""Connections that misbehave: peers that do not read, packets that vanish, frames that are none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from pla_serve.fleet.link.own import InstanceLink
from pla_serve.server.link import hub as server_link
from pla_serve.wire.link import PATH, SUBPROTOCOL, Alive
from tests.fleet.link.link_harness import FAST, Recorder, add, linked, running
from tests.server.fake_core import SILENT_SEED
from tests.server.server_harness import DEADLINE, Live, until


@pytest.fixture
def serve() -> Iterator[Callable[..., Live]]:
    servers: list[Live] = []

    def start(**options: Any) -> Live:
        servers.append(Live(**options))
        servers[-1].wait_ready()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


async def dial(server: Live, subprotocol: str = SUBPROTOCOL) -> ClientConnection:
    address = f"ws://127.0.0.1:{server.port}{PATH}"
    return await connect(
        address,
        subprotocols=[subprotocol],  # type: ignore[list-item]
        compression=None,
        proxy=None,
        ping_interval=None,
        max_queue=1,
    )


async def last_words(socket: ClientConnection) -> tuple[int, str]:
    """Reads to the end; how the server ended it."""
    async with asyncio.timeout(DEADLINE):
        with suppress(ConnectionClosed):
            while True:
                await socket.recv()
    assert socket.close_code is not None
    return socket.close_code, socket.close_reason or ""


class Proxy:
    """A wire to a server that can be cut without either end being told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._passes = asyncio.Event()
        self._passes.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    def cut(self) -> None:
        self._passes.clear()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, there_writer]
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._copy(source, sink))
            self._tasks.add(task)

    async def _copy(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65536):
                await self._passes.wait()
                sink.write(data)
        await self._passes.wait()
        sink.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def proxied(port: int) -> AsyncIterator[tuple[str, Proxy]]:
    proxy = Proxy(port)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", proxy
    finally:
        server.close()
        await proxy.close()


def test_a_wire_that_is_cut_in_silence_is_noticed_on_both_sides(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_link, "ROUTER_SILENCE_SECONDS", 3.0)
    server = serve()

    async def main() -> None:
        async with (
            proxied(server.port) as (url, proxy),
            linked(url, liveness_seconds=1.5) as (link, events),
        ):
            link.send(add("a", sampling={"seed": SILENT_SEED}))
            await events.until(lambda: events.accepted("a"))
            proxy.cut()
            await events.until(lambda: events.losses)
            assert events.losses == ["nothing was heard for 1.5 s"]
            await asyncio.to_thread(until, lambda: server.instance.traffic.in_flight == 0)

    asyncio.run(main())


def test_a_router_that_does_not_read_loses_its_requests_and_nobody_else(
    serve: Callable[..., Live],
) -> None:
    server = serve(env={"FAKE_TOKENS_PER_STEP": "50000", "FAKE_PAUSE": "0.001"})
    encode = msgspec.msgpack.Encoder().encode

    async def main() -> None:
        async with linked(server.url) as (link, events):
            deaf = await dial(server)
            try:
                endless = {"max_tokens": 10**9, "ignore_eos": True}
                await deaf.send(encode([add("a", sampling=endless)]))
                await events.until(lambda: events.reports[-1].requests == 1)
                await events.until(lambda: events.reports[-1].requests == 0)
                link.send(add("b"))
                await events.until(lambda: events.finish("b"))
                assert not events.losses
            finally:
                deaf.transport.abort()

    asyncio.run(main())


def test_what_is_no_frame_ends_the_link_with_the_reason(serve: Callable[..., Live]) -> None:
    server = serve()

    async def main() -> None:
        for frame in (b"\xc1", msgspec.msgpack.encode({"a": 1}), "text"):
            socket = await dial(server)
            await socket.send(frame)
            code, reason = await last_words(socket)
            assert code == 1007
            assert SUBPROTOCOL in reason

    asyncio.run(main())


def test_another_version_is_told_what_this_one_speaks(serve: Callable[..., Live]) -> None:
    server = serve()

    async def main() -> None:
        with pytest.raises(InvalidStatus) as caught:
            await dial(server, "pla-serve.link.999")
        assert caught.value.response.status_code == 400
        assert SUBPROTOCOL.encode() in (caught.value.response.body or b"")

    asyncio.run(main())


def test_a_router_that_says_nothing_but_alive_is_kept(
    serve: Callable[..., Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_link, "ROUTER_SILENCE_SECONDS", 1.0)
    server = serve()

    async def main() -> None:
        socket = await dial(server)
        silent = await dial(server)
        alive = msgspec.msgpack.encode([Alive()])
        ending = asyncio.create_task(last_words(silent))
        while not ending.done():  # reports come several times as often as the limit
            await socket.send(alive)
            await socket.recv()
        assert "the router was silent" in ending.result()[1]
        await socket.send(alive)
        await socket.recv()
        await socket.close()

    asyncio.run(main())


def test_an_owner_that_raises_does_not_leave_the_link_mute(
    serve: Callable[..., Live], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve()

    class Faulty(Recorder):
        def message(self, link: Any, message: Any) -> None:
            raise KeyError("a bug")

    async def main() -> None:
        events = Faulty()
        link = InstanceLink(server.url, events, backoff=FAST)
        with caplog.at_level(logging.CRITICAL):
            async with running(link):
                await events.until(lambda: events.boots)
                link.send(add("a"))
                await events.until(lambda: len(events.boots) == 2)
                assert "a bug" in events.losses[0]

    asyncio.run(main())
