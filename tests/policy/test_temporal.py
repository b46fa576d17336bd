from __future__ import annotations

import random

import pytest

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import BatchClass, PrefillRequest, Run
from pla_serve.policy.registry import create_policy
from pla_serve.policy.temporal import PrefillFirst
from tests.policy.executor import Executor, Job

CONFIG = PolicyConfig(max_batch_tokens=512, max_batch_requests=4)
PROFILE = CostProfile(1e-3, 1e-7, 1e-6, 1e-3, 2e-2)


def make(inner: str) -> tuple[PrefillFirst, CostModel]:
    cost = CostModel(PROFILE)
    return PrefillFirst(create_policy(inner, CONFIG, cost), CONFIG, cost), cost


@pytest.mark.parametrize("chaos", [0.0, 0.1])
@pytest.mark.parametrize("inner", ["fcfs", "hrrn", "srpt"])
def test_it_keeps_the_rules_and_never_mixes(inner: str, chaos: float) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        jobs = [
            Job(str(i), rng.uniform(0, 4), rng.randint(1, 900), outputs=rng.randint(1, 9))
            for i in range(25)
        ]
        policy, cost = make(inner)
        trace = Executor(policy, CONFIG, cost, jobs, chaos=chaos, seed=seed).run()
        for _, _, batch in trace.batches:
            assert not (batch.prefills and batch.decodes)


def test_no_step_while_a_prefill_waits() -> None:
    policy, _ = make("fcfs")
    policy.start_decode("a", 10, 0.0, 0.0)
    policy.add(PrefillRequest("b", 0.0, 800), 0.0)
    kinds = []
    for step in range(4):
        decision = policy.next(float(step))
        assert isinstance(decision, Run)
        kinds.append(bool(decision.batch.decodes))
        policy.observe(decision.batch, 0.5, step + 0.5)
        if not kinds[-1] and decision.batch.prefills[0].completes:
            policy.remove("b")
    assert kinds == [False, False, True, True]


def test_a_step_is_not_interrupted_and_delays_a_prefill_by_itself() -> None:
    policy, cost = make("length-aware")
    assert policy.capabilities.leaves_at_layer_boundary
    policy.start_decode("a", 10, 0.0, 0.0)
    decision = policy.next(0.0)
    assert isinstance(decision, Run)
    assert decision.batch.kind is BatchClass.DECODE
    step = cost.seconds(decision.batch)
    alone = make("length-aware")[0].predicted_wait(100, 0, 0.0)
    assert policy.predicted_wait(100, 0, 0.0) == pytest.approx(alone + step)
    assert policy.predicted_wait(100, 0, step / 2) == pytest.approx(alone + step / 2)
    policy.add(PrefillRequest("b", 0.0, 100), 0.01)
    assert policy.at_layer_boundary(0.01, decision.batch) is None
    assert policy.state(0.01).decoding_requests == 1
