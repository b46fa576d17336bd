"""Nobody waits for a token without bound, whatever the targets of others are."""

from __future__ import annotations

from itertools import count, pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.decodes import LOOSE_TARGET, DecodePool
from pla_serve.policy.registry import POLICIES, create_policy
from pla_serve.policy.temporal import PrefillFirst
from tests.policy.executor import Executor, Job, Trace

PROFILE = CostProfile(1e-3, 1e-7, 1e-6, 1e-4, 1e-2)
PLACES = 4
CONFIG = PolicyConfig(max_batch_requests=PLACES)
TARGETS = [None, 0.001, 0.05, 1.0, 1000.0]


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[str, float | None]]:
    """Tenant and target of each of some streams."""
    tenants = "abcde"[: draw(st.integers(1, 5))]
    one = st.tuples(st.sampled_from(tenants), st.sampled_from(TARGETS))
    return draw(st.lists(one, min_size=1, max_size=40))


@given(
    streams=streams(),
    places=st.integers(1, 9),
    step=st.sampled_from([0.001, 0.1, 3.0]),
    visitors=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_who_is_due_is_taken_within_the_stated_number_of_steps(
    streams: list[tuple[str, float | None]], places: int, step: float, visitors: bool
) -> None:
    """Also while strangers come again and again, in great haste, for one token each."""
    pool, now, numbers = DecodePool(), 0.0, count()
    owners = {str(number): owner for number, owner in enumerate(streams)}
    for name, (tenant, tpot) in owners.items():
        pool.start(name, 10, 0.0, tenant, tpot)
    due = {name: LOOSE_TARGET if tpot is None else tpot for name, (_, tpot) in owners.items()}
    passed = dict.fromkeys(owners, 0)
    tenants = len({tenant for tenant, _ in streams})
    for _ in range(120):
        strangers = 0
        if visitors:
            strangers = places
            for number in range(places):
                pool.start(f"visitor {next(numbers)}", 10, now, f"stranger {number}", 0.001)
        late = {name for name in owners if due[name] <= now}
        chunks = tuple(pool.take(places))
        taken = {chunk.request_id for chunk in chunks}
        now += step
        pool.settle(chunks, now)
        for name, (tenant, tpot) in owners.items():
            if name in taken:
                due[name], passed[name] = now + (LOOSE_TARGET if tpot is None else tpot), 0
            elif name in late:
                passed[name] += 1
                mine = sum(owner == tenant for owner, _ in streams)
                assert passed[name] < mine * ceil((tenants + strangers) / places) + 1
        for name in taken - set(owners):
            pool.discard(name)


def gaps(trace: Trace, name: str) -> list[float]:
    """Seconds between the tokens of a request, and from the last one to the end."""
    came = [
        end
        for _, end, batch in trace.batches
        for chunk in (*batch.prefills, *batch.decodes)
        if chunk.request_id == name and chunk.completes
    ]
    return [b - a for a, b in pairwise([*came, trace.batches[-1][1]])]


@pytest.mark.parametrize("hasty", [PLACES - 1, PLACES, PLACES + 1, 3 * PLACES])
@pytest.mark.parametrize("tpot", [0.001, 0.05])
@pytest.mark.parametrize("name", [*POLICIES, "prefill first"])
def test_targets_of_others_starve_no_stream(name: str, tpot: float, hasty: int) -> None:
    """One stream without a target beside as many with one as a batch has places, or more."""
    cost = CostModel(PROFILE)
    cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]  # no fit: exact
    policy = create_policy("fcfs" if name == "prefill first" else name, CONFIG, cost)
    if name == "prefill first":
        policy = PrefillFirst(policy, CONFIG, cost)
    jobs = [Job(f"hasty {n}", 0.0, 20, outputs=10**6, tpot=tpot) for n in range(hasty)]
    jobs.append(Job("patient", 0.0, 20, outputs=10**6))
    trace = Executor(policy, CONFIG, cost, jobs).run(until=12.0)
    step = max(end - start for start, end, batch in trace.batches)
    assert max(gaps(trace, "patient")) <= 1.0 + len(jobs) * step
    for n in range(hasty):
        assert max(gaps(trace, f"hasty {n}")) <= tpot + 2 * len(jobs) * step


def test_a_tenant_that_comes_again_and_again_keeps_nobody_out() -> None:
    """Of one place for two tenants, the newcomer has the next turn, not this one."""
    pool = DecodePool()
    pool.start("patient", 10, 0.0, "a")
    pool.start("other", 10, 0.0, "a")
    turns = []
    for number in range(12):
        pool.start(f"visitor {number}", 10, float(number), f"stranger {number}", 0.001)
        (chunk,) = pool.take(1)
        pool.settle((chunk,), number + 0.5)
        turns.append(chunk.request_id)
        if chunk.request_id.startswith("visitor"):
            pool.discard(chunk.request_id)
    assert {"patient", "other"} <= set(turns)


def test_many_tenants_with_several_streams_all_have_their_turn() -> None:
    """More of them than a batch has places, by far, and none ever has no stream that is ready."""
    pool, tenants, places = DecodePool(), 2500, 64
    for number in range(tenants):
        pool.start(f"{number} a", 10, 0.0, str(number))
        pool.start(f"{number} b", 10, 0.0, str(number))
    served: set[str] = set()
    for turn in range(ceil(tenants / places)):
        chunks = tuple(pool.take(places))
        pool.settle(chunks, turn + 1.0)
        served |= {chunk.request_id.split()[0] for chunk in chunks}
    assert len(served) == tenants
