"""The load generator in virtual time: open loop, order of sessions, bounds, failures."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.bench.client import Endpoint, RequestTarget
from pla_serve.bench.load import LEAD, LoadGenerator, Record, RunResult
from pla_serve.bench.text import FillerPart, make_filler
from pla_serve.bench.tiers import draw_tier
from pla_serve.bench.workload import BenchTurn, BenchWorkload, Session, WorkloadConfig, generate
from pla_serve.policy.tiers import Tier, parse_tier_share
from tests.bench.virtual import Script, ScriptedServer, run_virtual

TICK = pytest.approx


def turn(name: str, *, tokens: int = 5, answer: int = 3, **times: float) -> BenchTurn:
    return BenchTurn(name, "chat", (FillerPart(name, tokens),), tokens, answer, **times)


def single(*starts: float) -> BenchWorkload:
    return BenchWorkload(
        "test", tuple(Session(at, (turn(f"s{i}"),)) for i, at in enumerate(starts))
    )


def play(
    workload: BenchWorkload,
    server: ScriptedServer,
    *,
    max_seconds: float = 1e6,
    stop_at: float | None = None,
    endpoint: Endpoint = "chat",
    ids: bool = False,
    observer: Any = None,
) -> RunResult:
    async def main() -> RunResult:
        loop = asyncio.get_running_loop()
        generator = LoadGenerator(
            server,
            RequestTarget("m", endpoint),
            make_filler("salt"),
            clock=loop.time,
            ids=ids,
        )
        if stop_at is not None:
            loop.call_at(stop_at + LEAD, generator.stop)
        return await generator.run(workload, max_seconds, observer)

    return run_virtual(main())


def test_a_stalled_server_delays_nothing() -> None:
    starts = [0.0, 0.1, 0.2, 5.0, 5.0, 60.0]
    server = ScriptedServer(lambda body: Script(stalls=True))

    result = play(single(*starts), server, max_seconds=100)

    assert [seen.at - LEAD for seen in server.seen] == TICK(starts)
    assert {record.exchange.error for record in result.records} == {"unfinished"}
    assert result.stopped == "unfinished"
    assert result.seconds == TICK(100)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rate=st.floats(0.1, 50),
    burst=st.integers(1, 5),
    ttft=st.floats(0, 30),
)
def test_first_turns_leave_when_due_and_later_ones_after_answer_and_thought(
    seed: int, rate: float, burst: int, ttft: float
) -> None:
    config = WorkloadConfig(requests=25, rate=rate, burst=burst, seed=seed, think_seconds=2)
    workload = generate(config)
    server = ScriptedServer(lambda body: Script(ttft=ttft, gap=0.05))

    result = play(workload, server)

    assert len(result.records) == workload.requests == 25
    assert result.stopped is None
    by_session: dict[int, list[Record]] = {}
    for record in result.records:
        assert record.lag == TICK(0, abs=1e-6)
        by_session.setdefault(record.session, []).append(record)
    for number, records in by_session.items():
        session = workload.sessions[number]
        assert [record.turn for record in records] == list(session.turns)
        assert records[0].due == TICK(session.start)
        for before, after in itertools.pairwise(records):
            assert before.exchange.done is not None
            assert after.due == TICK(before.exchange.done + after.turn.think)


def test_times_are_what_the_script_says() -> None:
    server = ScriptedServer(lambda body: Script(ttft=0.5, gap=0.02, cached=2))
    (record,) = play(single(1.0), server).records

    assert record.due == TICK(1.0)
    assert record.ttft == TICK(0.5)
    assert record.exchange.gaps == TICK([0.02, 0.02])
    assert record.latency == TICK(0.54)
    assert record.exchange.output_tokens == 3
    assert record.exchange.prompt_tokens == 5
    assert record.new_tokens == 3


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (Script(status=429), "http 429"),
        (Script(status=500), "http 500"),
        (Script(error_after=2), "server error"),
        (Script(cut_after=1), "cut off"),
        (Script(tokens=0, usage=False), "malformed"),
    ],
)
def test_failures_are_told_apart_and_end_only_their_session(script: Script, error: str) -> None:
    workload = BenchWorkload(
        "test",
        (
            Session(0.0, (turn("bad"), turn("never"))),
            Session(1.0, (turn("good"), turn("too", think=1.0))),
        ),
    )
    scripts = iter([script])
    server = ScriptedServer(lambda body: next(scripts, Script()))

    result = play(workload, server)

    failed, *rest = result.records
    assert failed.exchange.error == error
    assert not failed.ok
    assert [record.turn.id for record in rest] == ["good", "too"]
    assert all(record.ok for record in rest)
    assert result.planned == 4


def test_a_connection_that_breaks_is_a_failure_not_a_crash() -> None:
    def refuse(body: dict[str, Any]) -> Script:
        raise ConnectionRefusedError("nobody there")

    (record,) = play(single(0.0), ScriptedServer(refuse)).records

    assert record.exchange.error == "connection"
    assert "nobody there" in record.exchange.detail


def test_stop_reports_what_there_is() -> None:
    server = ScriptedServer(lambda body: Script(ttft=1.5))

    result = play(single(0.0, 1.0, 2.0, 3.0), server, stop_at=2.4)

    assert result.stopped == "interrupted"
    assert [record.exchange.error for record in result.records] == [
        None,
        "interrupted",
        "interrupted",
    ]
    assert result.records[0].ok
    assert result.seconds == TICK(2.4)


def test_history_holds_the_real_answers() -> None:
    server = ScriptedServer()
    play(BenchWorkload("test", (Session(0.0, (turn("a"), turn("b"), turn("c"))),)), server)

    first, second, third = server.seen
    assert second.body["messages"][:1] == first.body["messages"]
    assert second.body["messages"][1] == {"role": "assistant", "content": first.answer}
    assert third.body["messages"][:3] == second.body["messages"]
    assert third.body["messages"][3] == {"role": "assistant", "content": second.answer}
    assert len(third.body["messages"]) == 5


def test_history_on_the_completions_endpoint_is_a_prefix() -> None:
    server = ScriptedServer()
    workload = BenchWorkload("test", (Session(0.0, (turn("a"), turn("b"))),))
    play(workload, server, endpoint="completions")

    first, second = server.seen
    assert second.body["prompt"].startswith(first.body["prompt"] + "\n" + first.answer)


def test_sessions_of_a_trace_remember_nothing_and_keep_their_offsets() -> None:
    turns = (turn("a"), turn("b", offset=10.0), turn("c", offset=10.2))
    server = ScriptedServer(lambda body: Script(ttft=1.0, gap=0.0))
    result = play(BenchWorkload("test", (Session(2.0, turns, remembers=False),)), server)

    assert [record.due for record in result.records] == TICK([2.0, 12.0, 13.0])
    assert [len(seen.body["messages"]) for seen in server.seen] == [1, 1, 1]


def test_token_ids_have_the_exact_size() -> None:
    server = ScriptedServer()
    workload = BenchWorkload("test", (Session(0.0, (turn("a", tokens=37),), remembers=False),))
    play(workload, server, endpoint="completions", ids=True)

    assert len(server.seen[0].body["prompt"]) == 37


def test_token_ids_cannot_carry_a_conversation() -> None:
    workload = BenchWorkload("test", (Session(0.0, (turn("a"), turn("b"))),))
    with pytest.raises(ValueError, match="text prompts"):
        play(workload, ScriptedServer(), endpoint="completions", ids=True)


def test_bodies_ask_for_usage_and_the_planned_length() -> None:
    server = ScriptedServer()
    play(single(0.0), server)

    body = server.seen[0].body
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert body["max_tokens"] == 3
    assert body["ignore_eos"] is True
    assert server.seen[0].path == "/v1/chat/completions"


def test_without_ignore_eos_the_field_is_absent_and_extras_are_there() -> None:
    fields = RequestTarget("m", ignore_eos=False, extra={"ttft_slo_ms": 300}).body([], 5)
    assert b"ignore_eos" not in fields
    assert b'"ttft_slo_ms":300' in fields


def test_a_request_asks_for_its_tier() -> None:
    target = RequestTarget("m", tiers=(parse_tier_share("night:share=2"), parse_tier_share("day")))
    assert b'"service_tier":"night"' in target.body([], 5, Tier("night"))
    assert b"service_tier" not in target.body([], 5)
    drawn = [draw_tier(target.tiers, session) for session in range(3000)]
    assert drawn == [draw_tier(target.tiers, session) for session in range(3000)]
    assert 1900 < drawn.count(Tier("night")) < 2100
    assert draw_tier((), 1) is None
