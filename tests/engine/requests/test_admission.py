"""Refusals come before any work, and name the fault."""

from __future__ import annotations

import pytest

from pla_serve.policy.admission import Admission
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.registry import create_policy
from pla_serve.wire.engine import Accepted, EngineStats
from tests.engine.chaos import ChaosPolicy
from tests.engine.tiny import VOCABULARY, make_engine


@pytest.mark.parametrize(
    ("prompt", "sampling", "reason"),
    [
        ([], {}, "empty"),
        ([1] * 64, {}, "64 tokens"),
        ([1, VOCABULARY], {}, f"outside 0 to {VOCABULARY - 1}"),
        ([1, -1], {}, "outside"),
        ([1] * 65, {"max_tokens": 0}, "65 tokens, more than this model's 64"),
        ([1], {"stop_token_ids": (VOCABULARY,)}, "stop_token_ids"),
        ([1], {"logit_bias": {-5: 1.0}}, "logit_bias"),
    ],
)
def test_faults_of_the_request(prompt: list[int], sampling: dict[str, object], reason: str) -> None:
    engine = make_engine("llama", ChaosPolicy(0), max_model_len=64)
    engine.add("bad", prompt, **sampling)
    engine.add("good", [1, 2], max_tokens=2, ignore_eos=True)
    engine.run()
    refusal = engine.rejected("bad")
    assert refusal is not None
    assert reason in refusal.reason
    assert refusal.retry_after is None
    assert len(engine.tokens("good")) == 2


def test_an_id_that_runs_is_refused_and_the_first_goes_on() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    engine.add("same", [1, 2], max_tokens=3, ignore_eos=True)
    engine.add("same", [4, 5], max_tokens=3, ignore_eos=True)
    engine.run()
    assert engine.rejected("same") is not None
    assert len(engine.tokens("same")) == 3


def test_over_capacity_is_told_at_once_and_with_a_time() -> None:
    cost = CostModel()
    policy = create_policy("length-aware", PolicyConfig(), cost)
    engine = make_engine("llama", policy, cost=cost, admission=Admission(max_queued_tokens=100))
    for index in range(4):
        engine.add(str(index), [index + 1] * 60, max_tokens=1)
    engine.run()
    admitted = [o.id for o in engine.emitted if isinstance(o, Accepted)]
    assert admitted == ["0"]
    refusal = engine.rejected("1")
    assert refusal is not None
    assert refusal.retry_after is not None
    assert refusal.retry_after >= 1


def test_what_waits_for_memory_counts_against_capacity() -> None:
    cost = CostModel()
    policy = create_policy("fcfs", PolicyConfig(), cost)
    admission = Admission(max_queued_tokens=100)
    engine = make_engine("llama", policy, cost=cost, blocks=20, admission=admission)
    engine.add("holder", [1] * 60, max_tokens=15, ignore_eos=True)
    engine.loop.step()
    engine.add("parked", [2] * 60, max_tokens=1)
    engine.loop.step()
    assert len(engine.parts.gate) == 1
    engine.add("refused", [3] * 60, max_tokens=1)
    engine.add("small", [4] * 30, max_tokens=1)
    engine.run()
    refusal = engine.rejected("refused")
    assert refusal is not None
    assert "60 prompt tokens wait already" in refusal.reason
    assert [len(engine.tokens(i)) for i in ("holder", "parked", "small")] == [15, 1, 1]


def test_the_time_of_those_who_wait_for_memory_counts_too() -> None:
    cost = CostModel(CostProfile(1e-3, 0, 0, 0, 0))
    cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]
    policy = create_policy("fcfs", PolicyConfig(), cost)
    admission = Admission(max_predicted_wait=0.1)
    engine = make_engine("llama", policy, cost=cost, blocks=20, admission=admission)
    engine.add("holder", [1] * 60, max_tokens=15, ignore_eos=True)
    engine.loop.step()
    for index in range(4):
        engine.add(f"parked{index}", [2 + index] * 40, max_tokens=1)
        engine.loop.step()
    assert engine.rejected("parked2") is None
    refusal = engine.rejected("parked3")
    assert refusal is not None
    assert "predicted wait of 0.1" in refusal.reason


def test_what_came_of_a_prediction_is_learned() -> None:
    """The clock moves a millisecond whenever it is asked: 50 times what the policy believes."""
    cost = CostModel(CostProfile(1e-6, 0, 0, 0, 0))
    cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]
    engine = make_engine("llama", create_policy("fcfs", PolicyConfig(), cost), cost=cost)
    calibration = engine.parts.intake.calibration
    for index in range(30):
        engine.add(str(index), [1 + index] * 20, max_tokens=2, ignore_eos=True)
        engine.run()
    foreseen = calibration.forecast(20e-6, True, 0.0)
    assert foreseen.median > 100 * foreseen.predicted
    last = [o for o in engine.emitted if isinstance(o, EngineStats)][-1]
    assert last.wait_error["short"] == calibration.error(True) > 0
    assert last.wait_error["long"] == 0
    assert 0 <= last.wait_coverage["short"] <= 1


def test_who_leaves_in_time_teaches_nothing_and_who_waited_in_vain_does_once() -> None:
    cost = CostModel(CostProfile(1e-6, 0, 0, 0, 0))
    engine = make_engine("llama", create_policy("fcfs", PolicyConfig(), cost), cost=cost)
    calibration = engine.parts.intake.calibration
    engine.add("waits", [1] * 20)
    engine.loop._inbox.take()
    engine.abort("waits")
    engine.abort("waits")
    engine.run()
    assert calibration.error(True) > 0
    cost = CostModel(CostProfile(1.0, 0, 0, 0, 0))
    patient = make_engine("llama", create_policy("fcfs", PolicyConfig(), cost), cost=cost)
    patient.add("leaves", [1] * 20)
    patient.loop._inbox.take()
    patient.abort("leaves")
    patient.run()
    assert patient.parts.intake.calibration.error(True) == 0


def test_output_stops_at_the_length_of_the_model() -> None:
    engine = make_engine("llama", ChaosPolicy(0), max_model_len=20)
    engine.add("x", [1] * 15, max_tokens=50, ignore_eos=True)
    engine.run()
    assert len(engine.tokens("x")) == 5
    assert engine.outputs("x")[-1].finish_reason == "length"


def test_going_idle_is_reported_once_with_all_counts() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    engine.add("x", [1] * 10, max_tokens=4, ignore_eos=True)
    engine.run()
    engine.run()
    reports = [o for o in engine.emitted if isinstance(o, EngineStats)]
    last = reports[-1]
    assert engine.emitted[-1] is last
    assert engine.emitted.count(last) == 1
    assert (last.prompt_tokens, last.generation_tokens, last.load.running) == (10, 4, 0)
    assert last.prefix_queries == 10
    assert sum(len(r.firsts) for r in reports) == 1
    assert last.load.kv_usage == 0
