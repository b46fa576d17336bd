"""Greedy tokens equal those of ``transformers.generate``, whatever the schedule does."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.engine.loop.loop import EngineLoop
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.registry import create_policy
from tests.engine.chaos import ChaosPolicy
from tests.engine.levels import NAMES, kernels_of
from tests.engine.tiny import (
    BLOCK,
    CONFIGS,
    MIXTURES,
    VOCABULARY,
    WINDOWED,
    Engine,
    expected,
    make_engine,
    runner_with,
)

PATIENT = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOKENS = 8


def prompts(rng: Random, count: int) -> list[tuple[int, ...]]:
    """Prompts of all lengths, of which many share prefixes with earlier ones."""
    made: list[tuple[int, ...]] = []
    for _ in range(count):
        length = rng.choice((1, 2, BLOCK, BLOCK + 1, 13, 40, 90))
        own = tuple(rng.randrange(1, VOCABULARY) for _ in range(length))
        if made and rng.random() < 0.5:
            base = rng.choice(made)
            own = base[: rng.randint(1, len(base))] + own
        made.append(own[:110])
    return made


def serve_at_random(engine: Engine, name: str, rng: Random, count: int, aborts: bool) -> None:
    """Requests and aborts arrive at random polls of the inbox, also in the middle of batches."""
    waiting = [(f"r{i}", prompt) for i, prompt in enumerate(prompts(rng, count))]
    wanted = dict(waiting)
    aborted: set[str] = set()

    def arrive() -> None:
        while waiting and rng.random() < 0.4:
            request_id, prompt = waiting.pop(0)
            engine.add(request_id, prompt, max_tokens=TOKENS)
        if aborts and rng.random() < 0.05:
            victim = rng.choice(sorted(wanted))
            aborted.add(victim)
            engine.abort(victim)

    engine.on_poll.append(arrive)
    while waiting:
        engine.run()
    engine.on_poll.clear()
    engine.run()
    for request_id, prompt in wanted.items():
        room = engine.parts.intake.limits.max_model_len - len(prompt)
        right = expected(name, prompt, TOKENS)[:room]
        got = engine.tokens(request_id)
        if request_id in aborted:
            assert got == right[: len(got)]
        else:
            assert got == right, request_id
            reason = "stop" if right[-1] == 0 else "length"
            assert engine.outputs(request_id)[-1].finish_reason == reason
    assert_at_rest(engine)


def assert_at_rest(engine: Engine) -> None:
    """Nothing is left of any request."""
    assert not engine.loop._requests
    assert not engine.loop._requests._waiting
    assert not len(engine.parts.gate)
    kv = engine.parts.kv
    assert kv.available == kv.blocks


SCHEDULES = given(
    seed=st.integers(0, 2**32), cached=st.booleans(), aborts=st.booleans(), tight=st.booleans()
)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(MIXTURES)))
@PATIENT
@SCHEDULES
def test_random_schedules(name: str, seed: int, cached: bool, aborts: bool, tight: bool) -> None:
    check_schedule(name, seed, cached, aborts, tight)


@pytest.mark.parametrize("name", sorted(MIXTURES))
@settings(PATIENT, max_examples=4)
@SCHEDULES
def test_random_schedules_of_mixtures(
    name: str, seed: int, cached: bool, aborts: bool, tight: bool
) -> None:
    check_schedule(name, seed, cached, aborts, tight)


def check_schedule(name: str, seed: int, cached: bool, aborts: bool, tight: bool) -> None:
    """Serve random requests in a random schedule; compare each token with the stock model's."""
    rng = Random(seed)
    blocks = rng.randint(30, 60) if tight else 256
    engine = make_engine(
        name,
        ChaosPolicy(seed),
        blocks=blocks,
        short_reserve=rng.randint(0, 2),
        prefix_cache=cached,
    )
    serve_at_random(engine, name, rng, count=8, aborts=aborts)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "qwen3-moe"])
@pytest.mark.parametrize("level", NAMES)
@settings(PATIENT, max_examples=8)
@given(seed=st.integers(0, 2**32), aborts=st.booleans())
def test_random_schedules_on_each_level_of_kernels(
    level: str, name: str, seed: int, aborts: bool
) -> None:
    engine = make_engine(name, ChaosPolicy(seed), runner_of=runner_with(name, kernels_of(level)))
    serve_at_random(engine, name, Random(seed), count=8, aborts=aborts)


@pytest.mark.parametrize("name", WINDOWED)
def test_prefixes_are_reused_at_odd_places_of_windows(name: str) -> None:
    """Turns of a conversation whose prefix is several windows long, and forks off the middle."""
    engine = make_engine(name, ChaosPolicy(1))
    history = tuple(Random(2).choices(range(1, VOCABULARY), k=75))
    for turn, kept in enumerate((75, 75, 38, 9, 67)):
        prompt = (*history[:kept], *range(turn + 1, turn + 4))
        engine.add(str(turn), prompt, max_tokens=TOKENS)
        engine.run()
        assert engine.tokens(str(turn)) == expected(name, prompt, TOKENS)
        if turn:
            assert engine.outputs(str(turn))[0].cached_tokens >= kept - kept % BLOCK


# One of each kind of batch; the baselines left out differ from fcfs in their order only.
@pytest.mark.parametrize("policy", ["fcfs", "laps", "flowprefill", "length-aware"])
@PATIENT
@given(seed=st.integers(0, 2**32), tight=st.booleans())
def test_policies(policy: str, seed: int, tight: bool) -> None:
    rng = Random(seed)
    cost = CostModel()
    config = PolicyConfig(
        boundary_tokens=rng.choice((4, 16)),
        long_chunk_tokens=rng.choice((5, 16, 64)),
        max_batch_tokens=rng.choice((16, 64, 256)),
        max_batch_requests=rng.choice((1, 3, 8)),
    )
    engine = make_engine(
        "llama",
        create_policy(policy, config, cost),
        cost=cost,
        blocks=40 if tight else 256,
        short_reserve=2,
    )
    serve_at_random(engine, "llama", rng, count=8, aborts=True)


def test_memory_runs_out_and_everyone_is_served() -> None:
    engine = make_engine("llama", ChaosPolicy(3), blocks=30, prefix_cache=False)
    asked = prompts(Random(5), 12)
    for index, prompt in enumerate(asked):
        engine.add(str(index), prompt[:60], max_tokens=40, ignore_eos=True)
    engine.run()
    assert engine.loop._telemetry.recompute_preemptions > 0, "the test is too easy"
    for index in range(len(asked)):
        assert len(engine.tokens(str(index))) == 40
    assert_at_rest(engine)


def test_a_reused_prefix_is_not_computed_again() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    turn = prompts(Random(1), 1)[0][:1] * 21
    engine.add("first", turn, max_tokens=6, ignore_eos=True)
    engine.run()
    answer = engine.tokens("first")
    follow_up = (*turn, *answer, 5, 6, 7)
    engine.add("second", follow_up, max_tokens=TOKENS)
    engine.run()
    assert engine.tokens("second") == expected("llama", follow_up, TOKENS)
    # All but the last token of the answer has its KV: 26 tokens, of which 24 are whole blocks.
    assert engine.outputs("second")[0].cached_tokens == 24


def test_aborting_the_only_request_leaves_its_pass_at_the_next_layer() -> None:
    engine = make_engine("llama", ChaosPolicy(0, express=0.0))
    polls: list[int] = []

    def abort_inside() -> None:
        polls.append(1)
        if len(polls) == 3:
            engine.abort("long")

    engine.add("long", [3] * 100)
    engine.on_poll.append(abort_inside)
    engine.loop.step()
    assert len(polls) == 3, "the pass went on after the abort"
    assert not engine.outputs("long")
    assert_at_rest(engine)


def test_a_short_prompt_is_answered_inside_a_long_one() -> None:
    cost = CostModel()
    config = PolicyConfig(boundary_tokens=16, long_chunk_tokens=512)
    engine = make_engine("llama", create_policy("length-aware", config, cost), cost=cost)
    polls: list[int] = []

    def arrive() -> None:
        polls.append(1)
        if len(polls) == 3:
            engine.add("short", [5, 6], max_tokens=1)

    long = tuple([3, 4] * 100)
    engine.add("long", long, max_tokens=1)
    engine.on_poll.append(arrive)
    engine.run()
    order = [o.id for o in engine.emitted if hasattr(o, "tokens")]
    assert order == ["short", "long"]
    assert engine.loop._telemetry.express_batches == 1
    assert engine.tokens("short") == expected("llama", (5, 6), 1)
    assert engine.tokens("long") == expected("llama", long, 1)


def test_memory_that_comes_free_inside_a_long_prompt_is_used_there() -> None:
    cost = CostModel()
    # One request a batch: the step that frees memory runs inside the long prompt, not with it.
    config = PolicyConfig(boundary_tokens=16, max_batch_requests=1, itl_slo_ms=1.0)
    policy = create_policy("length-aware", config, cost)
    engine = make_engine("llama", policy, cost=cost, blocks=28)
    engine.add("ends", [5] * 5, max_tokens=3, ignore_eos=True)
    engine.loop.step()
    engine.loop.step()
    assert len(engine.tokens("ends")) == 2
    engine.add("long", [3, 4] * 50, max_tokens=1)
    polls: list[int] = []

    def arrive() -> None:
        polls.append(1)
        if len(polls) == 2:
            engine.add("short", [7] * 12, max_tokens=1)

    engine.on_poll.append(arrive)
    engine.run()
    order = [o.id for o in engine.emitted if hasattr(o, "tokens")]
    assert order == ["ends", "ends", "ends", "short", "long"]


def test_the_loop_is_the_only_state() -> None:
    """Two engines around one runner do not disturb each other's bookkeeping."""
    engines = [make_engine("llama", ChaosPolicy(s), blocks=60) for s in range(2)]
    assert isinstance(engines[0].loop, EngineLoop)
    for engine in engines:
        engine.add("x", [1, 2, 3])
        engine.run()
    assert engines[0].tokens("x") == engines[1].tokens("x") == expected("llama", (1, 2, 3), 8)
