"""With one class only, length-aware is first come, first served."""

from __future__ import annotations

from copy import deepcopy

from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import BatchClass
from pla_serve.policy.registry import create_policy
from tests.policy.executor import Executor, Job, Trace

PROFILE = CostProfile(1e-3, 1e-7, 1e-6, 1e-4, 1e-2)


def serve(name: str, jobs: list[Job], config: PolicyConfig, seed: int, chaos: float) -> Trace:
    cost = CostModel(PROFILE)
    policy = create_policy(name, config, cost)
    separate = name == "length-aware"
    executor = Executor(policy, config, cost, jobs, chaos=chaos, seed=seed, separate=separate)
    return executor.run()


@st.composite
def jobs_of(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> list[Job]:
    jobs, now = [], 0.0
    for number in range(draw(st.integers(1, 30))):
        now += draw(st.sampled_from([0.0, 1e-9, 0.02, 0.5]))
        outputs = draw(st.integers(1, 6))
        priority = draw(st.sampled_from([0, 0, 1]))
        jobs.append(Job(f"r{number}", now, draw(sizes), outputs=outputs, priority=priority))
    return jobs


@given(
    jobs=jobs_of(st.integers(1, 120)),
    batch_tokens=st.sampled_from([1, 50, 300, 2048]),
    batch_requests=st.sampled_from([1, 2, 5, 64]),
    chunk=st.sampled_from([30, 512]),
    chaos=st.sampled_from([0.0, 0.05]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_shorts_alone_run_in_the_batches_of_fcfs(
    jobs: list[Job], batch_tokens: int, batch_requests: int, chunk: int, chaos: float, seed: int
) -> None:
    """The same batches at the same times, decode steps, aborts and parked requests included."""
    config = PolicyConfig(
        max_batch_tokens=batch_tokens,
        max_batch_requests=batch_requests,
        long_chunk_tokens=chunk,
        boundary_tokens=100_000,
    )
    ours = serve("length-aware", deepcopy(jobs), config, seed, chaos)
    theirs = serve("fcfs", jobs, config, seed, chaos)
    assert ours.batches == theirs.batches


@given(jobs=jobs_of(st.just(1300)), patience=st.sampled_from([0.0, 10.0]))
@settings(max_examples=40, deadline=None)
def test_equal_longs_get_their_first_tokens_in_order_of_arrival(
    jobs: list[Job], patience: float
) -> None:
    config = PolicyConfig(boundary_tokens=256, patience=patience)
    serve("length-aware", jobs, config, 0, 0.0)
    for priority in (0, 1):
        ordered = [job for job in jobs if job.priority == priority]
        firsts = [job.first_token for job in ordered]
        assert firsts == sorted(firsts)  # jobs are listed in order of arrival


@given(jobs=jobs_of(st.integers(257, 4000)))
@settings(max_examples=40, deadline=None)
def test_longs_alone_run_without_a_gap(jobs: list[Job]) -> None:
    """Between the first arrival and the last token the device rests only with nothing to do."""
    config = PolicyConfig(boundary_tokens=256)
    for job in jobs:
        job.outputs = 1
    trace = serve("length-aware", jobs, config, 0, 0.0)
    assert {batch.kind for _, _, batch in trace.batches} == {BatchClass.LONG}
    outer = sorted((start, end) for start, end, _ in trace.batches)
    free_at = 0.0
    for start, end in outer:
        if start > free_at:
            assert start in {job.arrival for job in jobs}
            assert all(job.arrival >= start or (job.first_token or 0) <= free_at for job in jobs)
        free_at = max(free_at, end)
