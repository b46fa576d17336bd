from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.baselines.fcfs import fcfs
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostProfile
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.queueing import mean_wait, mixed_wait
from pla_serve.policy.registry import POLICIES, create_policy
from pla_serve.policy.temporal import PrefillFirst
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.machine import KnownCost
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.solo import serve
from tests.simulator.stepper import Stepper

COST = KnownCost(CostProfile(1e-4, 2e-9, 1e-7, 1e-4, 1e-2))
CONFIG = PolicyConfig(max_batch_tokens=1024, max_batch_requests=8)
LAYERS = 6


def draw(seed: int, count: int, rate: float, longest: int = 6000) -> list[SimulatedRequest]:
    rng = random.Random(seed)
    now, jobs = 0.0, []
    for number in range(count):
        now += rng.expovariate(rate) if rng.random() > 0.2 else 0.0
        new = rng.randint(1, 200) if rng.random() < 0.7 else rng.randint(300, longest)
        history = rng.choice((0, 0, rng.randint(1, 20000)))
        jobs.append(SimulatedRequest(str(number), now, new, history, rng.randint(1, 12)))
    return jobs


def nothing(job: SimulatedRequest, now: float) -> None:
    pass


@dataclass
class Served:
    jobs: list[SimulatedRequest]
    instance: SimulatedInstance
    end: float


def simulate(
    policy: PrefillPolicy, jobs: list[SimulatedRequest], layers: int, decodes: bool
) -> Served:
    instance = SimulatedInstance(policy, COST, layers, nothing, nothing, decodes=decodes)
    return Served(jobs, instance, serve(instance, jobs))


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_events_give_the_same_times_as_stepping_through_every_layer(
    name: str, decodes: bool
) -> None:
    interrupted = 0
    for seed in range(12):
        layers = LAYERS if seed % 4 else 1
        mine, theirs = draw(seed, 40, 6.0), draw(seed, 40, 6.0)
        served = simulate(create_policy(name, CONFIG, COST), mine, layers, decodes)
        stepper = Stepper(create_policy(name, CONFIG, COST), COST, layers, decodes=decodes)
        stepper.run(theirs)
        assert [job.ttft for job in mine] == pytest.approx(
            [job.ttft for job in theirs], abs=1e-4
        ), f"seed {seed}"
        assert [job.finished for job in mine] == pytest.approx(
            [job.finished for job in theirs], abs=1e-4
        )
        assert served.instance.busy_seconds == pytest.approx(stepper.busy)
        interrupted += served.instance.express_batches
    assert (interrupted > 0) == create_policy(
        name, CONFIG, COST
    ).capabilities.leaves_at_layer_boundary


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(sorted(POLICIES)),
    decodes=st.booleans(),
    temporal=st.booleans(),
    rate=st.sampled_from([0.5, 5.0, 50.0]),
)
def test_no_job_is_lost_and_no_time_is_made_or_lost(
    seed: int, name: str, decodes: bool, temporal: bool, rate: float
) -> None:
    policy = create_policy(name, CONFIG, COST)
    if temporal:
        policy = PrefillFirst(policy, CONFIG, COST)
    prefilled: list[str] = []
    finished: list[str] = []
    instance = SimulatedInstance(
        policy,
        COST,
        LAYERS,
        lambda job, now: prefilled.append(job.id),
        lambda job, now: finished.append(job.id),
        decodes=decodes,
    )
    jobs = draw(seed, 60, rate)
    end = serve(instance, jobs)
    ids = sorted(job.id for job in jobs)
    assert sorted(prefilled) == sorted(finished) == ids
    assert not instance.jobs
    assert instance.computed_tokens == sum(job.new_tokens for job in jobs)
    assert instance.busy_seconds <= end + 1e-9
    for job in jobs:
        # No request is faster than its own tokens alone, the launches not counted twice.
        assert job.ttft >= COST.work_seconds(job.new_tokens, 0, 0, 0, 0) - 1e-9
        assert job.finished >= job.first_token
        assert job.produced == (job.output_tokens if decodes else 1)
    if max(job.arrival for job in jobs) == 0.0 and not decodes:
        assert instance.busy_seconds == pytest.approx(end)


def test_a_device_that_never_rests_is_busy_all_the_time() -> None:
    jobs = [SimulatedRequest(str(i), 0.0, 500 + i, 0) for i in range(30)]
    served = simulate(create_policy("length-aware", CONFIG, COST), jobs, LAYERS, False)
    assert served.instance.busy_seconds == pytest.approx(served.end)


def test_an_instance_that_dies_gives_back_what_it_held() -> None:
    instance = SimulatedInstance(
        create_policy("fcfs", CONFIG, COST), COST, LAYERS, nothing, nothing
    )
    jobs = [SimulatedRequest("a", 0.0, 100, 0), SimulatedRequest("b", 0.0, 5000, 0)]
    for job in jobs:
        instance.submit(job, 0.0)
    instance.advance(0.0)
    assert instance.withdraw() == jobs
    assert instance.wake_at == float("inf")
    state = instance.policy.state(1.0)
    assert (state.short_requests, state.long_requests) == (0, 0)


def waits(sizes: list[int], rate: float, seed: int) -> float:
    """Poisson arrivals, one request at a time, first come first served: TTFT less service, mean."""
    rng = random.Random(f"{seed}/gaps")  # not the numbers that the sizes were drawn from
    now, jobs = 0.0, []
    for number, size in enumerate(sizes):
        now += rng.expovariate(rate)
        jobs.append(SimulatedRequest(str(number), now, size, 0))
    config = PolicyConfig(max_batch_tokens=100_000, max_batch_requests=1)
    simulate(fcfs(config, COST), jobs, 1, False)
    return float(np.mean([job.ttft - COST.prefill_seconds(job.new_tokens, 0) for job in jobs]))


def test_waiting_is_that_of_the_head_of_line_formula() -> None:
    short, long, share, count = 50, 6000, 0.9, 25_000
    costs = [COST.prefill_seconds(short, 0), COST.prefill_seconds(long, 0)]
    rate = 0.6 / (share * costs[0] + (1 - share) * costs[1])
    waited = []
    for seed in range(3):
        rng = random.Random(seed)
        sizes = [short if rng.random() < share else long for _ in range(count)]
        waited.append(waits(sizes, rate, seed))
    assert np.mean(waited) == pytest.approx(mixed_wait(rate, share, *costs), rel=0.05)


def test_waiting_is_that_of_pollaczek_and_khinchine() -> None:
    rng = random.Random(8)
    sizes = [1 + int(rng.expovariate(1 / 2000)) for _ in range(60_000)]
    service = np.array([COST.prefill_seconds(size, 0) for size in sizes])
    rate = 0.6 / service.mean()
    expected = mean_wait(rate, service.mean(), (service**2).mean())
    assert waits(sizes, rate, 2) == pytest.approx(expected, rel=0.05)
