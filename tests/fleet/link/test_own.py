"""Links between a router and real instances, over real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

from pla_serve.fleet.link.own import InstanceLink
from pla_serve.fleet.link.protocol import LinkDown, LinkRefused, LossCause
from pla_serve.server.run import listen
from pla_serve.wire.engine import AbortRequest, Begin, Release
from tests.fleet.link.link_harness import FAST, Process, Recorder, add, linked, running
from tests.server.fake_core import EOS, REJECT_SEED, SILENT_SEED
from tests.server.server_harness import MODEL, Live, until

SILENT = {"seed": SILENT_SEED}


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


@pytest.fixture
def process() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start(**options: Any) -> Process:
        started.append(Process(**options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    server = Live()
    server.wait_ready()
    yield server
    server.close()


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


def test_facts_reports_and_an_answer(live: Live) -> None:
    async def main() -> None:
        async with linked(live.url) as (link, events):
            facts = link.facts
            assert facts is not None
            assert (facts.kind, facts.model, facts.max_model_len) == ("pla", MODEL, 512)
            assert facts.resumes
            assert facts.block_tokens == 16
            report = events.reports[0]
            assert (report.role, report.ready, report.draining) == ("mixed", True, False)
            assert report.kv_tokens == facts.kv_tokens
            link.send(add("a"))
            await events.until(lambda: events.finish("a"))
            assert events.accepted("a")
            assert events.tokens("a") == [10, 11, 12, 13, EOS]
            assert events.finish("a") == "stop"
            await events.until(lambda: events.reports[-1].load.cost)
            assert events.reports[-1].load.boundary_tokens == 256
            assert not events.losses

    run(main())


def test_a_request_goes_on_after_what_another_made(live: Live) -> None:
    async def main() -> None:
        async with linked(live.url) as (link, events):
            link.send(add("a", [20, 21, 22, 20, 21], generated=2))
            await events.until(lambda: events.finish("a"))
            assert events.tokens("a") == [22, EOS]

    run(main())


def test_times_are_those_of_the_instance(live: Live) -> None:
    """The instance gets differences; its own clock decides (here it is the same one)."""

    async def main() -> None:
        offset = 1e6
        loop = asyncio.get_running_loop()
        events = Recorder()
        link = InstanceLink(live.url, events, clock=lambda: loop.time() + offset)
        async with running(link):
            await events.until(lambda: events.boots)
            before = live.metric("pla_serve:time_to_first_token_seconds_sum", **{"class": "short"})
            link.send(replace(add("a"), arrival=loop.time() + offset))
            await events.until(lambda: events.finish("a"))
            after = await asyncio.to_thread(
                until,
                lambda: (
                    live.metric("pla_serve:time_to_first_token_seconds_sum", **{"class": "short"})
                    - before
                ),
            )
            assert 0 < after < 20

    run(main())


def test_routers_do_not_see_each_other(live: Live) -> None:
    async def main() -> None:
        async with linked(live.url) as (one, first), linked(live.url) as (two, second):
            one.send(add("same", [1, 2]))
            two.send(add("same", [3, 4]))
            await first.until(lambda: first.finish("same"))
            await second.until(lambda: second.finish("same"))
            assert first.tokens("same") == [1, 2, EOS]
            assert second.tokens("same") == [3, 4, EOS]
            one.set_role("long")
            await second.until(lambda: second.reports[-1].role == "long")
            two.drain(True)
            await first.until(lambda: first.reports[-1].draining)
            two.drain(False)
            one.set_role("mixed")
            await first.until(lambda: not first.reports[-1].draining)
            await first.until(lambda: first.reports[-1].role == "mixed")

    run(main())


def test_an_abort_is_the_last_of_a_request_and_its_name_is_free_again(live: Live) -> None:
    async def main() -> None:
        async with linked(live.url) as (link, events):
            link.send(add("a", sampling=SILENT))
            await events.until(lambda: events.accepted("a"))
            link.send(AbortRequest("a"))
            link.send(add("a", [7, 8]))
            await events.until(lambda: events.finish("a"))
            assert events.tokens("a") == [7, 8, EOS]
            link.send(AbortRequest("never heard of"))
            link.send(Release("never heard of"))

    run(main())


def test_refusals_come_back_by_name(live: Live) -> None:
    async def main() -> None:
        async with linked(live.url) as (link, events):
            link.send(add("full", sampling={"seed": REJECT_SEED}))
            refused = await events.until(lambda: events.rejected("full"))
            assert refused.retry_after == 1.5
            link.send(add("a", sampling=SILENT))
            link.send(add("a", sampling=SILENT))
            refused = await events.until(lambda: events.rejected("a"))
            assert "runs already" in refused.reason
            link.send(Begin(id="b", tokens=[1]))
            refused = await events.until(lambda: events.rejected("b"))
            assert "nothing is reserved" in refused.reason

    run(main())


def test_a_router_that_goes_takes_its_requests_along(serve: Callable[..., Live]) -> None:
    server = serve()
    traffic = server.instance.traffic

    async def main() -> None:
        async with linked(server.url) as (stays, others):
            stays.send(add("b", sampling=SILENT))
            async with linked(server.url) as (link, events):
                for index in range(3):
                    link.send(add(f"a{index}", sampling=SILENT))
                await events.until(lambda: all(events.accepted(f"a{i}") for i in range(3)))
                await others.until(lambda: others.accepted("b"))
                assert traffic.in_flight == 4
            await others.until(lambda: others.reports[-1].requests == 1)
            await others.until(lambda: others.reports[-1].load.running == 1)
            assert events.losses == ["this router closed the link"]

    run(main())
    until(lambda: traffic.in_flight == 0)


def test_kill_is_told_at_once_and_the_next_life_has_another_boot(
    process: Callable[..., Process],
) -> None:
    server = process()

    async def main() -> None:
        async with linked(server.url, liveness_seconds=60.0) as (link, events):
            link.send(add("a", sampling=SILENT))
            await events.until(lambda: events.accepted("a"))
            os.kill(server.engine, signal.SIGKILL)
            await events.until(lambda: len(events.losses) == 1)
            assert "SIGKILL" in events.losses[0]
            assert events.causes == [LossCause.ENDED]
            await events.until(lambda: len(events.boots) == 2)
            assert events.boots[0] != events.boots[1]
            link.send(add("b"))
            await events.until(lambda: events.finish("b"))
            os.kill(server.pid, signal.SIGKILL)
            await events.until(lambda: len(events.losses) == 2)
            with pytest.raises(LinkDown):
                link.send(add("c"))

    run(main())


@pytest.mark.parametrize("who", ["pid", "engine"])
def test_a_hang_is_silence_and_what_wakes_up_is_the_same_life(
    process: Callable[..., Process], who: str
) -> None:
    server = process()

    async def main() -> None:
        async with linked(server.url, liveness_seconds=1.5) as (link, events):
            link.send(add("a", sampling=SILENT))
            await events.until(lambda: events.accepted("a"))
            os.kill(getattr(server, who), signal.SIGSTOP)
            await events.until(lambda: events.losses)
            assert events.losses == ["nothing was heard for 1.5 s"]
            assert events.causes == [LossCause.SILENT]
            os.kill(getattr(server, who), signal.SIGCONT)
            await events.until(lambda: len(events.boots) == 2)
            assert events.boots[0] == events.boots[1]
            await events.until(lambda: events.reports[-1].requests == 0)
            link.send(add("b"))
            await events.until(lambda: events.finish("b"))
            assert events.outputs("a") == []

    run(main())


def test_a_drain_lets_what_runs_finish_and_takes_nothing_new(
    process: Callable[..., Process], tmp_path: Any
) -> None:
    gate = tmp_path / "gate"
    server = process(FAKE_GATE=str(gate), drain_seconds=60.0)

    async def main() -> None:
        async with linked(server.url) as (link, events):
            link.send(add("a", sampling={"seed": 8888}))
            await events.until(lambda: events.outputs("a"))
            server.child.send_signal(signal.SIGTERM)
            await events.until(lambda: not events.reports[-1].ready)
            link.send(add("late"))
            refused = await events.until(lambda: events.rejected("late"))
            assert refused.retry_after == 5.0
            gate.touch()
            await events.until(lambda: events.losses)
            assert events.finish("a") == "stop"
            assert await asyncio.to_thread(server.child.wait, 20) == 0

    run(main())


def test_a_wrong_key_is_refused_for_good(serve: Callable[..., Live]) -> None:
    server = serve(link_key="right", api_keys=("of a client",))

    async def main() -> None:
        link = InstanceLink(server.url, Recorder(), api_key="wrong", backoff=FAST)
        with pytest.raises(LinkRefused, match="401, wrong or missing link key"):
            await link.run()
        client = InstanceLink(server.url, Recorder(), api_key="of a client", backoff=FAST)
        with pytest.raises(LinkRefused, match="401, wrong or missing link key"):
            await client.run()
        async with linked(server.url, api_key="right") as (good, events):
            good.send(add("a"))
            await events.until(lambda: events.finish("a"))

    run(main())


def test_what_is_no_instance_is_refused_for_good(live: Live) -> None:
    async def main() -> None:
        link = InstanceLink(f"{live.url}/v1", Recorder(), backoff=FAST)
        with pytest.raises(LinkRefused, match="refused the link: HTTP 40"):
            await link.run()
        with pytest.raises(ValueError, match="http://HOST:PORT"):
            InstanceLink("127.0.0.1:8000", Recorder())

    run(main())


def test_an_instance_that_comes_later_is_found() -> None:
    async def main() -> None:
        events = Recorder()
        listener = listen("127.0.0.1", 0)
        port = listener.getsockname()[1]
        listener.close()
        link = InstanceLink(f"http://127.0.0.1:{port}", events, backoff=FAST)
        async with running(link):
            link.set_role("decode")
            with pytest.raises(LinkDown, match="no connection"):
                link.send(add("a"))
            server = await asyncio.to_thread(Live, listen_port=port)
            try:
                await events.until(lambda: events.reports and events.reports[-1].role == "decode")
            finally:
                await asyncio.to_thread(server.close)

    run(main())


def test_what_people_see(live: Live) -> None:
    async def main() -> None:
        async with linked(live.url), httpx.AsyncClient() as client:
            told = (await client.get(f"{live.url}/fleet/instance")).json()
            assert told["routers"] == 1
            assert told["facts"]["kind"] == "pla"
            assert told["report"]["role"] == "mixed"
            assert 0 <= told["engine_silent_seconds"] < 10

    run(main())
