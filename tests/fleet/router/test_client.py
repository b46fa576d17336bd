"""`FleetClient` on a real event loop, behind the sessions of the API."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pla_serve.fleet.link.protocol import LinkRefused
from pla_serve.fleet.router.client import FleetClient
from pla_serve.server.engine.backend import EngineStartError, EngineUnavailableError
from pla_serve.server.engine.session import EngineDiedError, SlowReaderError
from pla_serve.wire.engine import AddRequest, SamplingParams
from tests.fleet.router.fake_fleet import FakeLink, Recorder, oracle
from tests.server.server_harness import DEADLINE


class LiveLink(FakeLink):
    """A fake link with a `run` to live in."""

    refusal: Exception | None = None
    runs: int = 0

    async def run(self) -> None:
        self.runs += 1
        if self.refusal is not None:
            raise self.refusal
        await asyncio.Event().wait()

    async def close(self) -> None:
        self.connected = False


def make(links: list[LiveLink]) -> FleetClient:
    def maker(link: LiveLink) -> Callable[[Any], Any]:
        def with_events(events: Any) -> Any:
            link.fleet = events
            return link

        return with_events

    return FleetClient(
        [maker(link) for link in links], Recorder(), vocab_size=1000, refused_seconds=0.01
    )


def request(id: str, tokens: int = 4) -> AddRequest:
    sampling = SamplingParams(max_tokens=tokens, temperature=0)
    return AddRequest(id=id, prompt=[1, 2, 3], sampling=sampling, arrival=0.0)


def test_a_session_is_served_and_says_so_when_it_is_slow() -> None:
    async def main() -> None:
        link = LiveLink("i0")
        client = make([link])
        running = asyncio.create_task(client.run())
        with pytest.raises(EngineUnavailableError):
            await client.wait_ready(0.01)
        link.connect()
        info = await client.wait_ready(1)
        assert info.max_model_len == 4096
        session = client.session(100)
        session.submit(request("r"))
        link.step(4)
        link.flush()
        [update] = await session.receive()
        assert update.tokens == oracle([1, 2, 3], SamplingParams(max_tokens=4, temperature=0))
        slow = client.session(2)
        slow.submit(request("s", 9))
        link.step(3)
        link.flush()
        with pytest.raises(SlowReaderError):
            await slow.receive()
        assert not link.jobs
        assert client.fleet.in_flight == 0
        await client.stop()
        await running

    asyncio.run(main())


def test_closing_a_session_aborts_what_it_has_in_flight() -> None:
    async def main() -> None:
        link = LiveLink("i0")
        client = make([link])
        link.connect()
        session = client.session(100)
        session.submit(request("a"))
        session.submit(request("b"))
        session.close()
        assert not link.jobs
        assert client.fleet.in_flight == 0

    asyncio.run(main())


def test_stop_ends_what_is_in_flight_by_name() -> None:
    async def main() -> None:
        link = LiveLink("i0")
        client = make([link])
        running = asyncio.create_task(client.run())
        link.connect()
        session = client.session(100)
        session.submit(request("a"))
        await client.stop()
        with pytest.raises(EngineDiedError, match="shutting down"):
            await session.receive()
        await running
        assert client.status == "stopped"
        with pytest.raises(EngineDiedError):
            session.submit(request("b"))

    asyncio.run(main())


def test_readiness_follows_the_instances() -> None:
    link = LiveLink("i0")
    client = make([link])
    assert client.status == "starting"
    link.connect()
    assert client.is_ready
    link.report(draining=True)
    assert not client.is_ready
    link.report()
    assert client.is_ready
    link.cut()
    assert client.status == "restarting"


def test_a_router_that_nobody_lets_in_gives_up_and_says_why() -> None:
    async def main() -> None:
        link = LiveLink("i0")
        link.refusal = LinkRefused("i0 wants another key")
        with pytest.raises(EngineStartError, match="another key"):
            await make([link]).run()

    asyncio.run(main())


def test_one_that_refuses_is_asked_again_and_costs_the_others_nothing() -> None:
    async def main() -> None:
        links = [LiveLink("i0"), LiveLink("i1")]
        links[0].refusal = LinkRefused("i0 is of another version")
        client = make(links)
        running = asyncio.create_task(client.run())
        links[1].connect()
        await client.wait_ready(1)
        async with asyncio.timeout(DEADLINE):
            while links[0].runs < 3:
                await asyncio.sleep(0.005)
        links[0].refusal = LinkRefused("i0 has another key now")
        links[1].refusal = LinkRefused("i1 as well")
        assert not running.done()
        await client.stop()
        await running

    asyncio.run(main())


def test_a_link_that_fails_is_made_again_and_the_router_lives() -> None:
    """Whatever the bug: the other instances serve."""

    async def main() -> None:
        links = [LiveLink("i0"), LiveLink("i1")]
        links[0].refusal = OverflowError("cannot convert float infinity to integer")
        client = make(links)
        running = asyncio.create_task(client.run())
        links[1].connect()
        await client.wait_ready(1)
        async with asyncio.timeout(DEADLINE):
            while links[0].runs < 3:
                await asyncio.sleep(0.005)
        assert not running.done()
        await client.stop()
        await running

    asyncio.run(main())
