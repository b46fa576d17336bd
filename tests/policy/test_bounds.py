"""The stated bounds on every wait hold against arrivals that are out to break them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.fairness import (
    ShareAccount,
    burst_seconds,
    long_wait_bound,
    passing_window,
    short_wait_bound,
    token_wait_bound,
)
from pla_serve.policy.longs import BULK_PATIENCE
from pla_serve.policy.protocol import BatchClass, ServiceLevel
from pla_serve.policy.queues import PATIENCE
from pla_serve.policy.registry import POLICIES, create_policy
from tests.policy.executor import Executor, Job, Trace

PROFILE = CostProfile(1e-3, 1e-7, 1e-6, 1e-4, 1e-2)
CONFIG = PolicyConfig(boundary_tokens=256, express_burst_seconds=1.0)
SLACK = 1e-6


def serve(jobs: list[Job], config: PolicyConfig, layers: int = 6, until: float = 1e9) -> Trace:
    cost = CostModel(PROFILE)
    cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]  # no fit: exact
    policy = create_policy("length-aware", config, cost)
    executor = Executor(policy, config, cost, jobs, layers=layers, separate=True)
    return executor.run(until)


def burst(config: PolicyConfig) -> float:
    return burst_seconds(config, CostModel(PROFILE))


def long_bound(job: Job, jobs: list[Job], trace: Trace, config: PolicyConfig) -> float:
    """`long_wait_bound` with what was really computed before the job's first token."""
    cost, most = CostModel(PROFILE), config.max_batch_tokens
    own = cost.prefill_seconds(job.tokens, job.cached, most)
    reach = job.arrival + passing_window(config, own, cost.prefill_seconds(most, 0))
    if job.service is ServiceLevel.BULK:
        reach += BULK_PATIENCE
    may_pass = {other.id for other in jobs if other.arrival <= reach}
    assert job.first_token is not None
    work = 0.0
    for start, end, batch in trace.batches:
        if batch.kind is BatchClass.LONG and start < job.first_token and end > job.arrival:
            late = {chunk.request_id for chunk in batch.prefills} - may_pass
            assert not late, "passed by one that came too late"
            work += CostModel(PROFILE).seconds(batch)
    return long_wait_bound(config, work, trace.express_batch, burst_seconds(config, cost))


def short_bound(config: PolicyConfig, batches: int, trace: Trace) -> float:
    """`short_wait_bound` with what ran."""
    return short_wait_bound(
        config,
        batches,
        trace.express_batch,
        trace.stretch,
        burst(config),
        streams=any(batch.decodes for _, _, batch in trace.batches),
    )


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_long_under_a_flood_of_shorts(share: float) -> None:
    """Shorts arrive faster than the machine can serve them, for ever."""
    config = replace(CONFIG, long_share=share)
    long = Job("long", 2.0, 4000)
    flood = [Job(f"s{n}", n * 0.05, 100, deadline=n * 0.05 + 0.5) for n in range(1200)]
    trace = serve([long, *flood], config, until=60)
    assert long.first_token is not None, "starved"
    wait = long.first_token - long.arrival
    assert wait <= long_bound(long, [long], trace, config) + SLACK
    express = sum(b.kind is not BatchClass.LONG for s, _, b in trace.batches if s >= 2.0)
    assert express > 0, "the flood was not one"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("layers", [1, 6])
def test_short_under_a_flood_of_longs(share: float, layers: int) -> None:
    """Longs pile up from the start; now and then shorts come in bursts that use up the credit."""
    config = replace(CONFIG, long_share=share)
    longs = [Job(f"l{n}", n * 0.3, 900 + 40 * n) for n in range(60)]
    shorts = [Job(f"s{n}", 3 + n // 12 * 4.0, 200, outputs=4) for n in range(60)]
    trace = serve(longs + shorts, config, layers)
    for short in shorts:
        before = [s for s in shorts if s.arrival <= short.arrival]
        bound, alone = (short_bound(config, batches, trace) for batches in (len(before) + 2, 14))
        assert short.first_token is not None
        assert short.first_token - short.arrival <= min(bound, alone) + SLACK


@st.composite
def one_priority(draw: st.DrawFn) -> list[Job]:
    jobs, now = [], 0.0
    for number in range(draw(st.integers(1, 30))):
        now += draw(st.sampled_from([0.0, 0.05, 0.4, 2.0]))
        tokens = draw(st.one_of(st.integers(1, 256), st.integers(257, 3000)))
        service = draw(st.sampled_from([ServiceLevel.USUAL, ServiceLevel.USUAL, ServiceLevel.BULK]))
        outputs = draw(st.integers(1, 30))
        jobs.append(Job(f"r{number}", now, tokens, outputs=outputs, service=service))
    return jobs


@given(
    jobs=one_priority(),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    burst_given=st.sampled_from([None, 0.0, 0.3, 3.0]),
    patience=st.sampled_from([0.0, 0.5, 3.0]),
    layers=st.sampled_from([1, 5]),
)
@settings(max_examples=80, deadline=None)
def test_both_bounds_under_random_arrivals(
    jobs: list[Job], share: float, burst_given: float | None, patience: float, layers: int
) -> None:
    config = replace(CONFIG, long_share=share, express_burst_seconds=burst_given, patience=patience)
    trace = serve(jobs, config, layers)
    shorts = [job for job in jobs if job.short]
    for job in jobs:
        assert job.first_token is not None
        wait = job.first_token - job.arrival
        if job.short:
            ahead = [s for s in shorts if s.arrival <= job.arrival and s.first_token > job.arrival]
            batches = len(ahead) + 2
            bound = short_bound(config, batches, trace)
        else:
            bound = long_bound(job, jobs, trace, config)
        assert wait <= bound + SLACK


@st.composite
def streams_and_prompts(draw: st.DrawFn) -> list[Job]:
    """A few streams from the start, with targets of their own or none, and random prompts."""
    jobs = []
    for number in range(draw(st.integers(1, 6))):
        tpot = draw(st.sampled_from([None, 0.02, 0.1, 1.0]))
        tenant = draw(st.sampled_from(["", "", "a", "b"]))
        outputs = draw(st.integers(20, 120))
        jobs.append(Job(f"d{number}", 0.0, 20, outputs=outputs, tpot=tpot, tenant=tenant))
    return jobs + draw(one_priority())


@given(
    jobs=streams_and_prompts(),
    target=st.sampled_from([None, 15.0, 60.0, 500.0]),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    layers=st.sampled_from([1, 5, 20]),
    places=st.sampled_from([2, 5, 64]),
)
@settings(max_examples=80, deadline=None)
def test_every_token_comes_within_its_bound(
    jobs: list[Job], target: float | None, share: float, layers: int, places: int
) -> None:
    config = replace(
        CONFIG, long_share=share, itl_slo_ms=target, layers=layers, max_batch_requests=places
    )
    trace = serve(jobs, config, layers)
    times: dict[str, list[float]] = {}
    for _, end, batch in trace.batches:
        for chunk in (*batch.prefills, *batch.decodes):
            if chunk.completes:
                times.setdefault(chunk.request_id, []).append(end)
    riding = [e - s for s, e, b in trace.batches if b.kind is BatchClass.LONG and b.decodes]
    chunk_seconds = max((CostModel(PROFILE).seconds(b) for *_, b in trace.batches if b.decodes))
    tenants = Counter(job.tenant for job in jobs)
    for job in jobs:
        own = job.tpot if job.tpot is not None else (target / 1000 if target else longest_auto())
        bound = token_wait_bound(
            config,
            own,
            tenants[job.tenant] * len(tenants),
            trace.express_batch,
            chunk_seconds if riding else 0.0,
            trace.stretch,
            burst(config),
        )
        came = times[job.id]
        assert len(came) == job.outputs
        assert all(b - a <= bound + SLACK for a, b in pairwise(came)), job.id


def longest_auto() -> float:
    """Above the target that 36 streams of a few thousand tokens have without settings."""
    return 1.5


def test_long_turn_is_not_interrupted() -> None:
    """Once the burst is used up, long work runs until the account is level."""
    config = replace(CONFIG, long_share=0.5, express_burst_seconds=1.0)
    flood = [Job(f"s{n}", n * 0.05, 100) for n in range(400)]
    trace = serve([Job("long", 0.0, 20_000), *flood], config, until=20)
    kinds = [batch.kind for _, _, batch in sorted(trace.batches, key=lambda row: row[0])]
    seconds = {BatchClass.LONG: 0.0, BatchClass.SHORT: 0.0}
    for _, _, batch in trace.batches:
        seconds[batch.kind] += CostModel(PROFILE).seconds(batch)
    assert BatchClass.SHORT in kinds
    assert seconds[BatchClass.LONG] == pytest.approx(seconds[BatchClass.SHORT], rel=0.2)


def test_late_short_is_passed_only_for_a_while() -> None:
    """A short that misses its deadline waits for those that can be saved, not for ever."""
    hopeless = Job("late", 1.0, 100, deadline=1.0)
    flood = [Job(f"s{n}", n * 0.1, 100, deadline=n * 0.1 + 30) for n in range(400)]
    config = replace(CONFIG, max_batch_tokens=100)  # one at a time, slightly overloaded
    serve([hopeless, *flood], config)
    assert hopeless.first_token is not None
    assert hopeless.first_token - 1.0 > 0.5
    passed = [job for job in flood if (job.first_token or 0) < hopeless.first_token]
    assert max(job.arrival for job in passed) <= 1.0 + 2 * PATIENCE


def test_longs_without_hope_pass_nobody_for_ever() -> None:
    """Ten a second, more than one decision puts back, and all too late from the start."""
    config = replace(CONFIG, patience=10.0)
    patient = Job("patient", 1.0, 1000, deadline=1.5)
    flood = [Job(f"l{n}", n * 0.1, 1000, deadline=n * 0.1 + 0.5) for n in range(400)]
    trace = serve([patient, *flood], config, layers=1)
    assert patient.first_token is not None
    cost = CostModel(PROFILE)
    window = passing_window(
        config, cost.prefill_seconds(1000, 0), cost.prefill_seconds(config.max_batch_tokens, 0)
    )
    assert patient.first_token <= 1.0 + long_bound(patient, [patient, *flood], trace, config)
    passed = [job for job in flood if (job.first_token or 0) < patient.first_token]
    assert max(job.arrival for job in passed) <= 1.0 + window


def test_a_long_that_can_be_saved_interrupts_one_that_cannot_any_more() -> None:
    """The first could have made it, but for the shorts that ran inside it."""
    lost = Job("lost", 0.0, 2000, deadline=2.9)
    shorts = [Job(f"s{n}", 0.1, 100) for n in range(8)]
    saved = Job("saved", 1.5, 1000, deadline=3.1)
    serve([lost, *shorts, saved], replace(CONFIG, long_chunk_tokens=2048))
    assert lost.first_token is not None
    assert lost.first_token > 2.9 + 1.0
    assert saved.first_token is not None
    assert saved.first_token <= 3.1


@pytest.mark.parametrize("name", POLICIES)
def test_decodes_beyond_a_batch_take_turns(name: str) -> None:
    config = PolicyConfig(max_batch_requests=4)
    cost = CostModel(PROFILE)
    jobs = [Job(f"d{n}", 0.0, 5, outputs=40) for n in range(11)]
    policy = create_policy(name, config, cost)
    trace = Executor(policy, config, cost, jobs).run()
    steps: dict[str, list[int]] = {}
    for number, (_, _, batch) in enumerate(trace.batches):
        for chunk in batch.decodes:
            steps.setdefault(chunk.request_id, []).append(number)
    gaps = [b - a for rows in steps.values() for a, b in pairwise(rows)]
    assert max(gaps) <= 11 / 2 + 1


def account_of(config: PolicyConfig) -> ShareAccount:
    return ShareAccount(config.long_share, lambda: burst(config))


class TestShareAccount:
    def test_level_at_the_start_and_never_in_credit(self) -> None:
        account = account_of(CONFIG)
        account.start_long(0.0)
        account.settle(100.0)
        assert account.ahead == 0
        account.charge_express(0.9)
        assert not account.longs_turn

    @given(
        share=st.floats(0.05, 0.95),
        burst=st.floats(0, 3),
        pieces=st.lists(st.tuples(st.booleans(), st.floats(0.001, 0.5)), max_size=60),
    )
    def test_stated_inequality(
        self, share: float, burst: float, pieces: list[tuple[bool, float]]
    ) -> None:
        """express <= long * (1 - s) / s + burst + the longest express batch."""
        account = account_of(replace(CONFIG, long_share=share, express_burst_seconds=burst))
        now = express = long = longest = 0.0
        for wants_express, seconds in pieces:
            now += seconds
            if wants_express and not account.longs_turn:
                account.charge_express(seconds)
                express += seconds
                longest = max(longest, seconds)
            else:
                account.start_long(now - seconds)
                account.stop_long(now)
                long += seconds
            assert express <= long * (1 - share) / share + burst + longest + SLACK

    def test_pauses_do_not_count(self) -> None:
        account = account_of(CONFIG)
        account.charge_express(5.0)
        account.start_chunk(0.0)
        account.stop_long(1.0)
        account.start_long(11.0)
        assert account.settle(12.0) == pytest.approx(1.0)
        assert account.ahead == pytest.approx(3.0)


def test_bounds_grow_with_what_they_depend_on() -> None:
    base = long_wait_bound(CONFIG, 10, 0.2, 1.0)
    assert base == pytest.approx(10 / 0.5 + 1.0 + 2 * 0.2)
    assert long_wait_bound(replace(CONFIG, long_share=0.9), 10, 0.2, 1.0) < base
    assert short_wait_bound(CONFIG, 3, 0.2, 0.1, 1.0) < short_wait_bound(CONFIG, 3, 0.2, 0.3, 1.0)
    assert passing_window(replace(CONFIG, patience=0), 3, 1) == 0
    assert passing_window(replace(CONFIG, patience=10), 4, 1) == pytest.approx(20)
