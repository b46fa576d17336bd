"""Report arithmetic against numpy and against plain counting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.bench.client import TimedRequest
from pla_serve.bench.load import Record, RunResult
from pla_serve.bench.report import ALL, LONG, SHORT, Objectives, percentiles, summarise
from pla_serve.bench.tiers import kept
from pla_serve.bench.workload import BenchTurn
from pla_serve.policy.tiers import Tier, parse_tier_share

seconds = st.floats(0, 100, allow_nan=False)


@st.composite
def exchanges(draw: st.DrawFn) -> TimedRequest:
    sent = draw(seconds)
    error = draw(st.sampled_from([None, None, None, "http 429", "unfinished", "interrupted"]))
    if error is not None:
        return TimedRequest(sent=sent, error=error)
    gaps = draw(st.lists(st.floats(0, 2), max_size=6))
    first = sent + draw(seconds)
    return TimedRequest(
        sent=sent,
        first=first,
        done=first + sum(gaps),
        gaps=gaps,
        pause=max(gaps, default=None),
        prompt_tokens=draw(st.integers(1, 5000)),
        cached_tokens=draw(st.one_of(st.none(), st.integers(0, 400))),
        output_tokens=len(gaps) + 1,
    )


@st.composite
def records(draw: st.DrawFn) -> Record:
    exchange = draw(exchanges())
    assert exchange.sent is not None
    lag = draw(st.floats(0, 1))
    turn = BenchTurn("t", "chat", (), draw(st.integers(1, 5000)), 8)
    return Record(turn, 0, exchange.sent - lag, exchange)


@dataclass
class Oracle:
    """The same numbers by loops, apart from the code under test."""

    members: list[Record]
    objectives: Objectives

    def is_short(self, record: Record) -> bool:
        answer = record.exchange
        if answer.prompt_tokens is None or answer.cached_tokens is None:
            return record.turn.new_tokens <= self.objectives.short_tokens
        new = max(answer.prompt_tokens - answer.cached_tokens, 1)
        return new <= self.objectives.short_tokens

    def of(self, name: str) -> list[Record]:
        kept = [r for r in self.members if r.exchange.error != "interrupted"]
        return [r for r in kept if name == ALL or self.is_short(r) == (name == SHORT)]

    def met(self, record: Record) -> bool:
        answer = record.exchange
        if answer.error or answer.first is None:
            return False
        limit = self.objectives.ttft_short if self.is_short(record) else self.objectives.ttft_long
        slow = limit is not None and answer.first - record.due > limit
        jerky = (
            self.objectives.itl is not None
            and bool(answer.gaps)
            and sum(answer.gaps) / len(answer.gaps) > self.objectives.itl
        )
        return not (slow or jerky)


limits = st.one_of(st.none(), st.floats(0.01, 50))


@settings(max_examples=200, deadline=None)
@given(
    members=st.lists(records(), max_size=30),
    run_seconds=st.floats(0.1, 1000),
    short=st.integers(0, 3000),
    slos=st.tuples(limits, limits, limits),
)
def test_against_an_oracle(
    members: list[Record],
    run_seconds: float,
    short: int,
    slos: tuple[float | None, float | None, float | None],
) -> None:
    objectives = Objectives(short, *slos)
    oracle = Oracle(members, objectives)
    report = summarise(RunResult(members, run_seconds, len(members), None), objectives)

    for name in (SHORT, LONG, ALL):
        part, group = report.classes[name], oracle.of(name)
        good = [r for r in group if r.exchange.error is None]
        assert (part.requests, part.succeeded) == (len(group), len(good))
        assert part.requests_per_second == pytest.approx(len(good) / run_seconds)
        assert part.output_tokens == sum(r.exchange.output_tokens or 0 for r in good)
        assert part.prompt_tokens_per_second == pytest.approx(
            sum(r.exchange.prompt_tokens or 0 for r in good) / run_seconds
        )
        unknown = any(r.exchange.cached_tokens is None for r in good)
        assert part.cached_tokens == (
            None if unknown else sum(r.exchange.cached_tokens or 0 for r in good)
        )
        same(part.ttft, [(r.exchange.first or 0) - r.due for r in good])
        same(part.latency, [(r.exchange.done or 0) - r.due for r in good])
        same(part.itl, [gap for r in good for gap in r.exchange.gaps])
        pauses = [max(r.exchange.gaps) for r in good if r.exchange.gaps]
        same(part.pause, pauses)
        assert part.longest_pause == max(pauses, default=None)
        if objectives.given:
            met = sum(oracle.met(r) for r in group)
            assert part.goodput == pytest.approx(met / run_seconds)
            assert part.slo_attainment == (met / len(group) if group else None)
        else:
            assert part.goodput is part.slo_attainment is None
    failed = sum(report.errors.values())
    assert failed == sum(r.exchange.error is not None for r in members)


def same(found: Any, values: list[float]) -> None:
    if not values:
        assert found is None
        return
    assert found.count == len(values)
    assert (found.p50, found.p90, found.p99) == pytest.approx(
        tuple(np.quantile(values, [0.5, 0.9, 0.99]))
    )
    assert found.mean == pytest.approx(math.fsum(values) / len(values))


def test_percentiles_by_hand() -> None:
    found = percentiles([4.0, 1.0, 2.0, 3.0, 5.0])
    assert found is not None
    assert (found.p50, found.p90, found.p99) == pytest.approx((3.0, 4.6, 4.96))
    assert percentiles([]) is None


def run(*members: Record, stopped: str | None = None) -> RunResult:
    return RunResult(list(members), 10.0, 5, stopped)


def record(*, due: float = 0.0, sent: float = 0.0, cached: int | None = 0) -> Record:
    turn = BenchTurn("t", "chat", (), 10, 8)
    answer = TimedRequest(
        sent=sent, first=1.0, done=2.0, prompt_tokens=10, cached_tokens=cached, output_tokens=1
    )
    return Record(turn, 0, due, answer)


def test_a_late_client_is_told() -> None:
    quick = summarise(run(record(sent=0.05)), Objectives())
    late = summarise(run(record(sent=0.5)), Objectives())
    assert not quick.warnings
    assert "the client itself was late" in late.warnings[0]


def test_lateness_of_the_client_counts_in_ttft() -> None:
    report = summarise(run(record(sent=0.5)), Objectives())
    assert report.classes[ALL].ttft is not None
    assert report.classes[ALL].ttft.p50 == 1.0


def test_what_was_stopped_or_failed_or_not_reported_is_told() -> None:
    broken = Record(
        BenchTurn("t", "chat", (), 10, 8), 0, 0.0, TimedRequest(sent=0.0, error="http 429")
    )
    report = summarise(run(record(cached=None), broken, stopped="unfinished"), Objectives())
    assert report.errors == {"http 429": 1}
    told = "\n".join(report.warnings)
    assert "unfinished: 2 of 5" in told
    assert "1 requests failed" in told
    assert "no cached tokens" in told


@pytest.mark.parametrize(
    "fields", [{"short_tokens": -1}, {"ttft_short": 0.0}, {"itl": -1.0}, {"ttft_long": math.nan}]
)
def test_objectives_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Objectives(**fields)


class TestTiers:
    """A first token half a second after the due time, then gaps of a tenth."""

    def record(self, tier: Tier, **exchange: Any) -> Record:
        fields = {"sent": 1.0, "first": 1.5, "done": 1.8, "gaps": [0.1, 0.1, 0.1], **exchange}
        turn = BenchTurn("t", "chat", (), 10, 4)
        return Record(turn, 0, 1.0, TimedRequest(**fields), tier)

    @pytest.mark.parametrize(
        ("tier", "met"),
        [
            (Tier("t", 0.5, 0.11), True),
            (Tier("t", 0.49, 9.0), False),
            (Tier("t", 0.7, 0.04), True),
            (Tier("t", 0.6, 0.04), False),
            (Tier("t", None, 0.11), True),
            (Tier("t", None, 0.09), False),
            (Tier("t", 0.5), True),
        ],
    )
    def test_token_i_is_due_i_targets_after_the_first(self, tier: Tier, met: bool) -> None:
        record = self.record(tier)
        assert kept(record.exchange, record.ttft, tier) is met

    def test_who_was_refused_is_no_broken_promise_and_who_failed_is(self) -> None:
        quick, bulk = parse_tier_share("quick:ttft=1s,share=3"), parse_tier_share("bulk")
        found = [
            self.record(quick.tier),
            self.record(quick.tier, error="http 429", done=None),
            self.record(quick.tier, error="timeout"),
            self.record(quick.tier, first=2.5),
            self.record(bulk.tier, pause=3.0),
        ]
        goals = Objectives(tiers=("quick:ttft=1s,share=3", "bulk"))
        report = summarise(RunResult(found, 2.0, 5, None), goals)
        figures = report.tiers["quick:ttft=1s"]
        assert (figures.requests, figures.refused, figures.succeeded) == (4, 1, 2)
        assert figures.attainment == pytest.approx(1 / 3)
        assert figures.ttft is not None
        assert figures.ttft.count == 2
        assert (report.tiers["bulk"].attainment, report.tiers["bulk"].longest_pause) == (None, 3.0)

    def test_a_tier_without_requests_has_no_numbers(self) -> None:
        report = summarise(RunResult([], 2.0, 0, None), Objectives(tiers=("quick:ttft=1s",)))
        figures = report.tiers["quick:ttft=1s"]
        assert (figures.requests, figures.attainment, figures.ttft) == (0, None, None)
