"""Offline work beside online work, on virtual time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.harvest import Harvesting
from pla_serve.policy.protocol import Batch, BatchClass, Idle, PrefillRequest, Run, ServiceLevel
from pla_serve.policy.registry import create_policy
from tests.policy.executor import Executor, Job

PROFILE = CostProfile(1e-3, 1e-7, 1e-6, 1e-4, 1e-2)
LAYERS = 6
CONFIG = PolicyConfig(boundary_tokens=256, express_burst_seconds=1.0, layers=LAYERS)
Ran = list[tuple[float, float, Batch]]


class Dated(Harvesting):
    """Notes when it hears of each request, and can be told that a request came earlier."""

    def __init__(
        self, name: str, config: PolicyConfig, cost: CostModel, arrivals: dict[str, float]
    ) -> None:
        super().__init__(create_policy(name, config, cost), config, cost)
        self.heard: dict[str, float] = {}
        self._arrivals = arrivals

    def add(self, request: PrefillRequest, now: float) -> None:
        self.heard.setdefault(request.id, now)
        arrival = self._arrivals.get(request.id, request.arrival)
        super().add(replace(request, arrival=arrival), now)


def run(
    jobs: list[Job],
    name: str = "length-aware",
    config: PolicyConfig = CONFIG,
    arrivals: dict[str, float] | None = None,
) -> tuple[Ran, Dated, float]:
    """Run jobs to their end: what ran, the policy, and the longest stretch without a boundary."""
    cost = CostModel(PROFILE)
    cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]  # no fit: exact
    policy = Dated(name, config, cost, arrivals or {})
    executor = Executor(
        policy,
        config,
        cost,
        jobs,
        layers=LAYERS,
        separate=name == "length-aware",
        waits=True,
    )
    trace = executor.run()
    return trace.batches, policy, trace.stretch


def offline(count: int, tokens: int = 700, outputs: int = 5) -> list[Job]:
    level = ServiceLevel.OFFLINE
    return [Job(f"line-{i}", 0.0, tokens, outputs=outputs, service=level) for i in range(count)]


def online_only(batches: Ran) -> Ran:
    return [ran for ran in batches if ran[2].kind is not BatchClass.OFFLINE]


ONLINE = st.lists(
    st.tuples(
        st.floats(0.0, 8.0),
        st.one_of(st.integers(1, 256), st.integers(257, 3000)),
        st.integers(1, 12),
        st.sampled_from(["", "a", "b"]),
    ),
    min_size=1,
    max_size=14,
)


@given(ONLINE, st.integers(1, 40), st.integers(1, 2000), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_online_work_runs_as_it_would_without_a_backlog(
    online: list[tuple[float, int, int, str]], lines: int, tokens: int, outputs: int
) -> None:
    """It is heard of one layer later at most; from there on each batch is the same."""
    rows = sorted(online)

    def jobs(at: dict[str, float]) -> list[Job]:
        return [
            Job(f"{i}", at.get(f"{i}", row[0]), row[1], outputs=row[2], tenant=row[3])
            for i, row in enumerate(rows)
        ]

    beside, policy, _ = run([*jobs({}), *offline(lines, tokens, outputs)])
    layer = max(
        CostModel(PROFILE).seconds(batch) / LAYERS
        for _, _, batch in beside
        if batch.kind is BatchClass.OFFLINE
    )
    arrivals = {f"{i}": row[0] for i, row in enumerate(rows)}
    alone, _, stretch = run(jobs(policy.heard), arrivals=arrivals)
    for id, arrival in arrivals.items():
        assert policy.heard[id] - arrival <= max(layer, stretch_of(beside, stretch)) + 1e-9
    assert [ran[2] for ran in online_only(beside)] == [ran[2] for ran in alone]
    for (start, end, _), (other, there, _) in zip(online_only(beside), alone, strict=True):
        assert start == pytest.approx(other, abs=1e-6)
        assert end == pytest.approx(there, abs=1e-6)


def stretch_of(batches: Ran, stretch: float) -> float:
    """The longest time for which the executor hears nobody: an express batch, or a layer."""
    express = [b for _, _, b in batches if b.kind not in (BatchClass.OFFLINE, BatchClass.LONG)]
    return max([stretch, *(CostModel(PROFILE).seconds(batch) for batch in express)])


@pytest.mark.parametrize("name", ["length-aware", "fcfs", "hrrn", "flowprefill"])
def test_lines_are_done_beside_any_policy(name: str) -> None:
    online = [Job(f"{i}", i * 0.7, 100 + 900 * (i % 2), outputs=4) for i in range(6)]
    batches, _, _ = run([*online, *offline(12)], name)
    kinds = [batch.kind for _, _, batch in batches]
    assert kinds.count(BatchClass.OFFLINE) > 5
    for _, _, batch in batches:
        ids = {chunk.request_id for chunk in (*batch.prefills, *batch.decodes)}
        lines = {id for id in ids if id.startswith("line")}
        assert lines == (ids if batch.kind is BatchClass.OFFLINE else set())


def test_an_offline_batch_is_left_at_the_next_layer() -> None:
    """And its rest is computed once, after the online work."""
    short = Job("short", 0.05, 50, outputs=3)
    batches, policy, _ = run([short, *offline(1, 4000)])
    assert policy.heard["short"] - 0.05 < 0.05
    (left,) = [ran for ran in batches if ran[0] < 0.05]
    assert left[2].kind is BatchClass.OFFLINE
    served = [ran for ran in batches if ran[2].kind is not BatchClass.OFFLINE]
    assert len(served) == 3
    assert served[-1][1] < left[1]


def test_offline_requests_are_no_load() -> None:
    cost = CostModel(PROFILE)
    policy = Harvesting(create_policy("length-aware", CONFIG, cost), CONFIG, cost)
    before = policy.predicted_wait(100, 0, 0.0)
    for i in range(50):
        level = ServiceLevel.OFFLINE
        policy.add(PrefillRequest(f"{i}", 0.0, 1000, service=level, tenant="a"), 0.0)
    assert policy.state(0.0).seconds == 0
    assert policy.load_of("a").tokens == 0
    assert policy.predicted_wait(100, 0, 0.0) == before
    decision = policy.next(0.0)
    assert isinstance(decision, Run)
    for i in range(50):
        policy.remove(f"{i}")
    policy.remove("unknown")
    policy.observe(Batch(BatchClass.OFFLINE), 0.01, 0.01)
    assert policy.next(0.01) == Idle()
