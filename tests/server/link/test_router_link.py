"""The instance's side of one router: names, clocks, offers, bounds, and the end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from pla_serve.policy.protocol import ServiceLevel
from pla_serve.server.api.guard import Traffic
from pla_serve.server.engine.session import AnswerReceiver, EngineDiedError
from pla_serve.server.link.router_link import MOST_OFFERS, RouterLink
from pla_serve.server.records.metrics import Metrics
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    Begin,
    HandOver,
    Inbound,
    Lend,
    Offer,
    Output,
    Rejected,
    Release,
    Reserve,
    SamplingParams,
)
from pla_serve.wire.frames import Outbox
from pla_serve.wire.link import FromInstance

decode = msgspec.msgpack.Decoder(list[FromInstance]).decode


@dataclass
class Engine:
    """Records what a link asks for."""

    up: bool = True
    routes: dict[str, AnswerReceiver] = field(default_factory=dict)
    sent: list[Any] = field(default_factory=list)

    def open_route(self, id: str, session: AnswerReceiver) -> None:
        if not self.up:
            raise EngineDiedError("the engine is not running")
        self.routes[id] = session

    def close_route(self, id: str) -> None:
        self.routes.pop(id, None)

    def send(self, message: Inbound) -> None:
        self.sent.append(message)


class Harness:
    def __init__(self, number: int = 3) -> None:
        self.engine = Engine()
        self.traffic = Traffic(Metrics("m"))
        self.cuts: list[str] = []
        self.link = RouterLink(
            number, self.engine, self.traffic, self.cuts.append, clock=lambda: 1000.0
        )

    async def said(self) -> list[Any]:
        """What the router would read now."""
        waiting = asyncio.ensure_future(self.link.outbox.take())
        await asyncio.sleep(0)
        if not waiting.done():
            waiting.cancel()
            return []
        return decode(waiting.result())


def add(id: str, **fields: Any) -> AddRequest:
    fields = {"arrival": -0.5, **fields}
    return AddRequest(id=id, prompt=[1], sampling=SamplingParams(max_tokens=9), **fields)


def test_names_and_times_become_the_engines_own() -> None:
    async def main() -> None:
        harness = Harness()
        harness.link.handle(add("a:b", deadline=2.0, tpot=0.04, service=ServiceLevel.PROMISED))
        (request,) = harness.engine.sent
        assert (request.id, request.arrival, request.deadline) == ("3.1:a:b", 999.5, 1002.0)
        assert (request.tpot, request.service) == (0.04, ServiceLevel.PROMISED)
        harness.link.take(Output(id=request.id, tokens=[5], finish_reason="stop"))
        assert await harness.said() == [Output(id="a:b", tokens=[5], finish_reason="stop")]
        assert harness.traffic.in_flight == 0
        assert not harness.engine.routes

    asyncio.run(main())


def test_a_server_that_ends_lends_and_waits_until_its_kv_was_read() -> None:
    async def main() -> None:
        harness = Harness()
        harness.traffic.give_notice(9.0)
        harness.link.handle(add("new"))
        (refusal,) = await harness.said()
        assert isinstance(refusal, Rejected)
        harness.link.handle(Lend(id="loan", tokens=[1, 2], lease_seconds=5.0))
        (lend,) = harness.engine.sent
        assert harness.traffic.in_flight == 1
        harness.link.take(Offer(id=lend.id, source=b"kv", tokens=2))
        assert harness.traffic.in_flight == 1
        harness.link.handle(Release("loan"))
        harness.link.handle(Release("loan"))
        assert harness.traffic.in_flight == 0
        for end in (harness.link.close, lambda: harness.link.fail(EngineDiedError("gone"))):
            harness.link.handle(Lend(id="loan", tokens=[1, 2], lease_seconds=5.0))
            harness.link.take(Offer(id=harness.engine.sent[-1].id, source=b"kv", tokens=2))
            assert harness.traffic.in_flight == 1
            end()
            assert harness.traffic.in_flight == 0
        harness.link.handle(Lend(id="nothing", tokens=[1, 2], lease_seconds=5.0))
        harness.link.take(Offer(id=harness.engine.sent[-1].id, source=b"", tokens=0))
        assert harness.traffic.in_flight == 0

    asyncio.run(main())


def test_a_request_sent_again_after_an_abort_is_another_one() -> None:
    async def main() -> None:
        harness = Harness()
        harness.link.handle(add("a"))
        harness.link.handle(AbortRequest("a"))
        harness.link.handle(add("a"))
        first, abort, second = harness.engine.sent
        assert abort == AbortRequest(first.id)
        assert first.id != second.id
        assert list(harness.engine.routes) == [second.id]
        assert harness.traffic.in_flight == 1

    asyncio.run(main())


def test_a_hand_over_is_open_until_it_is_released() -> None:
    async def main() -> None:
        harness = Harness()
        harness.link.handle(add("a", hand_over=HandOver(lease_seconds=1.0)))
        name = harness.engine.sent[0].id
        harness.link.take(Accepted(name, 0))
        harness.link.take(Offer(id=name, source=b"x", tokens=1))
        harness.link.take(Output(id=name, tokens=[5], finish_reason="handed_over"))
        assert [message.id for message in await harness.said()] == ["a", "a", "a"]
        assert harness.traffic.in_flight == 0
        harness.link.handle(Release("a"))
        harness.link.handle(Release("a"))
        assert harness.engine.sent[1:] == [Release(name)]

    asyncio.run(main())


def test_a_reservation_is_begun_under_its_name_and_a_lend_ends_with_its_offer() -> None:
    async def main() -> None:
        harness = Harness()
        harness.link.handle(Reserve(request=add("r"), source=b"", lease_seconds=1.0))
        harness.link.handle(Begin(id="r", tokens=[4]))
        reserve, begin = harness.engine.sent
        assert reserve.request.arrival == 999.5
        assert begin.id == reserve.request.id
        harness.link.handle(Begin(id="never", tokens=[4]))
        (refused,) = await harness.said()
        assert isinstance(refused, Rejected)
        harness.link.handle(Lend(id="l", tokens=[1, 2], lease_seconds=1.0))
        lend = harness.engine.sent[-1]
        harness.link.take(Offer(id=lend.id, source=b"x", tokens=2))
        assert harness.link.requests == 1, "only the reservation"
        harness.link.handle(Lend(id="empty", tokens=[1, 2], lease_seconds=1.0))
        harness.link.take(Offer(id=harness.engine.sent[-1].id, source=b"", tokens=0))
        harness.link.close()
        assert AbortRequest(reserve.request.id) in harness.engine.sent
        assert [m for m in harness.engine.sent if isinstance(m, Release)] == [Release(lend.id)]

    asyncio.run(main())


def test_a_closed_link_leaves_nothing_behind() -> None:
    async def main() -> None:
        harness = Harness()
        for id in "abc":
            harness.link.handle(add(id))
        names = [message.id for message in harness.engine.sent]
        harness.link.close()
        assert [m.id for m in harness.engine.sent if isinstance(m, AbortRequest)] == names
        assert harness.traffic.in_flight == 0
        assert not harness.engine.routes

    asyncio.run(main())


def test_refusals_while_draining_or_without_an_engine_can_be_tried_again() -> None:
    async def main() -> None:
        harness = Harness()
        harness.engine.up = False
        harness.link.handle(add("a"))
        harness.engine.up = True
        harness.traffic.draining = True
        harness.link.handle(add("b"))
        first, second = await harness.said()
        assert (first.id, first.reason) == ("a", "the engine is not running")
        assert (second.id, second.reason) == ("b", "the instance is shutting down")
        assert first.retry_after
        assert second.retry_after
        assert not harness.engine.sent
        assert harness.traffic.in_flight == 0

    asyncio.run(main())


def test_an_engine_that_died_takes_all_along() -> None:
    async def main() -> None:
        harness = Harness()
        harness.link.handle(add("a"))
        harness.link.fail(EngineDiedError("killed"))
        assert harness.traffic.in_flight == 0
        assert await harness.said() == []
        harness.link.handle(add("a"))
        assert harness.traffic.in_flight == 1

    asyncio.run(main())


def test_a_router_that_does_not_read_is_cut_before_it_holds_much() -> None:
    async def main() -> None:
        harness = Harness()
        harness.link.outbox = Outbox(1000)
        harness.link.handle(add("a"))
        name = harness.engine.sent[0].id
        for _ in range(1000):
            harness.link.take(Output(id=name, tokens=[5]))
            if harness.cuts:
                break
        assert "wait to be read" in harness.cuts[0]

    asyncio.run(main())


def test_forgotten_offers_are_bounded() -> None:
    async def main() -> None:
        harness = Harness()
        for index in range(MOST_OFFERS + 5):
            harness.link.take(Offer(id=f"3.1:o{index}", source=b"x", tokens=1))
            if index % 500 == 0:
                await harness.said()
        harness.link.close()
        released = [m for m in harness.engine.sent if isinstance(m, Release)]
        assert len(released) == MOST_OFFERS

    asyncio.run(main())


@pytest.mark.parametrize("id", ["", ":", "3.1:x"])
def test_any_text_is_a_name(id: str) -> None:
    async def main() -> None:
        harness = Harness()
        harness.link.handle(add(id))
        harness.link.take(Output(id=harness.engine.sent[0].id, tokens=[1]))
        assert (await harness.said())[0].id == id

    asyncio.run(main())


def test_log_names_the_request_of_the_client(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    harness = Harness()
    for id in ("a", "b", "c"):
        harness.link.handle(add(id, request_id=f"mine-{id}"))
    harness.link.handle(add("d"))
    a, b, *_ = harness.engine.routes
    harness.link.take(Output(id=a, tokens=[1], finish_reason="length"))
    harness.link.take(Rejected(id=b, reason="full", retry_after=1.0))
    harness.link.close()
    told = {record.request_id: record.outcome for record in caplog.records}  # type: ignore[attr-defined]
    assert told == {"mine-a": "length", "mine-b": "refused", "mine-c": "aborted"}
