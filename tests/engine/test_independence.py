"""Whatever is sampled, and however, does not depend on the schedule."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.registry import create_policy
from pla_serve.wire.engine import Grammar, TokenLogprob
from tests.engine.chaos import ChaosPolicy
from tests.engine.test_outputs import assert_at_rest
from tests.engine.tiny import VOCABULARY, WINDOWED, Engine, grammar_compiler, make_engine

TOLERANCE = 1e-3
"""Of log probabilities: batches of other shapes round differently."""
KINDS: tuple[dict[str, object], ...] = (
    {"temperature": 1.0, "seed": 11},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "logprobs": 0},
    {"temperature": 1.2, "seed": 3, "presence_penalty": 0.8, "min_tokens": 6},
    {"temperature": 1.0, "seed": 4, "grammar": Grammar("regex", "[a-f]{2}-[0-9]{1,20}")},
    {"temperature": 0.9, "grammar": Grammar("json_object"), "logprobs": 2},
    {"temperature": 1.0, "logit_bias": {7: 4.0, 8: -100.0}, "stop_token_ids": (9,)},
)
Result = tuple[tuple[int, ...], list[TokenLogprob], object, object]


def requests(seed: int) -> dict[str, tuple[list[int], dict[str, object]]]:
    rng = Random(seed)
    made = {}
    for index in range(2 * len(KINDS)):
        prompt = [rng.randrange(1, VOCABULARY) for _ in range(rng.choice((1, 5, 12, 30)))]
        made[f"r{index}"] = (prompt, {"max_tokens": 24, **KINDS[index % len(KINDS)]})
    return made


def results(engine: Engine, request_id: str) -> Result:
    outputs = engine.outputs(request_id)
    logprobs = [logprob for output in outputs for logprob in output.logprobs or ()]
    last = outputs[-1]
    assert last.error is None
    return engine.tokens(request_id), logprobs, last.finish_reason, last.stop_token


@cache
def undisturbed(seed: int, name: str = "qwen3") -> dict[str, Result]:
    """One request after the other, with all memory and nothing cached."""
    cost = CostModel()
    policy = create_policy("fcfs", PolicyConfig(), cost)
    engine = make_engine(name, policy, cost=cost, prefix_cache=False, grammars=grammar_compiler())
    for request_id, (prompt, sampling) in requests(seed).items():
        engine.add(request_id, prompt, **sampling)
        engine.run()
    return {request_id: results(engine, request_id) for request_id in requests(seed)}


def assert_same(found: Result, right: Result) -> None:
    assert found[0] == right[0]
    assert found[2:] == right[2:]
    assert len(found[1]) == len(right[1])
    for one, other in zip(found[1], right[1], strict=True):
        assert abs(one.logprob - other.logprob) < TOLERANCE
        for (_, mine), (_, theirs) in zip(one.top, other.top, strict=True):
            assert abs(mine - theirs) < TOLERANCE


def disturbed(seed: int, schedule: int, blocks: int, cached: bool, name: str = "qwen3") -> Engine:
    """Random chunks, preemption and arrivals, in the memory of about two requests."""
    rng = Random(schedule)
    engine = make_engine(
        name,
        ChaosPolicy(schedule),
        blocks=blocks,
        prefix_cache=cached,
        grammars=grammar_compiler(),
    )
    waiting = list(requests(seed).items())

    def arrive() -> None:
        while waiting and rng.random() < 0.4:
            request_id, (prompt, sampling) = waiting.pop(0)
            engine.add(request_id, prompt, **sampling)

    engine.on_poll.append(arrive)
    while waiting:
        engine.run()
    engine.run()
    assert_at_rest(engine)
    return engine


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1),
    schedule=st.integers(0, 2**32),
    blocks=st.integers(20, 40),
    cached=st.booleans(),
)
def test_sampling_does_not_depend_on_the_schedule(
    seed: int, schedule: int, blocks: int, cached: bool
) -> None:
    engine = disturbed(seed, schedule, blocks, cached)
    for request_id, right in undisturbed(seed).items():
        assert_same(results(engine, request_id), right)


@pytest.mark.parametrize("name", [*WINDOWED, "qwen2-moe"])
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedule=st.integers(0, 2**32), blocks=st.integers(20, 40), cached=st.booleans())
def test_nor_does_it_in_other_families(name: str, schedule: int, blocks: int, cached: bool) -> None:
    engine = disturbed(0, schedule, blocks, cached, name)
    for request_id, right in undisturbed(0, name).items():
        assert_same(results(engine, request_id), right)


def test_that_includes_those_who_lost_their_memory() -> None:
    engine = disturbed(1, 1, 20, cached=False)
    assert engine.loop._telemetry.recompute_preemptions > 3, "the test is too easy"
    assert engine.loop._telemetry.express_batches > 3, "the test is too easy"
    for request_id, right in undisturbed(1).items():
        assert_same(results(engine, request_id), right)
