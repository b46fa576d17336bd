"""One batch ahead of the device: nobody's tokens change, and no memory is given away too early."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.batch.flat import FlatBatch
from pla_serve.engine.run.runner import AtBoundary
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import BatchClass, PrefillPolicy
from pla_serve.policy.registry import create_policy
from pla_serve.wire.engine import AddRequest, Grammar, SamplingParams
from tests.engine.chaos import ChaosPolicy
from tests.engine.late import LateEngine, late_engine, late_runner
from tests.engine.test_outputs import assert_at_rest, prompts, serve_at_random
from tests.engine.tiny import (
    BLOCK,
    VOCABULARY,
    Engine,
    expected,
    grammar_compiler,
    make_engine,
)

POLICIES = ["chaos", "length-aware", "fcfs", "flowprefill", "fastserve", "laps"]
GREEDY = settings(max_examples=8, deadline=None)


def make_policy(name: str, rng: Random) -> PrefillPolicy:
    if name == "chaos":
        return ChaosPolicy(rng.randrange(2**32), express=0.4)
    config = PolicyConfig(
        boundary_tokens=rng.choice((4, 16)),
        long_chunk_tokens=rng.choice((5, 16, 64)),
        max_batch_tokens=rng.choice((16, 64)),
        max_batch_requests=rng.choice((1, 3, 8)),
    )
    return create_policy(name, config, CostModel())


@pytest.mark.parametrize("policy", POLICIES)
@GREEDY
@given(seed=st.integers(0, 2**32), tight=st.booleans(), aborts=st.booleans())
def test_greedy_tokens_are_those_of_generate(
    policy: str, seed: int, tight: bool, aborts: bool
) -> None:
    rng = Random(seed)
    late = late_engine(
        make_policy(policy, rng),
        blocks=rng.randint(32, 44) if tight else 256,
        short_reserve=rng.randint(0, 2),
        depth=rng.choice((1, 2, 3)),
    )
    sometimes_quick(late, rng)
    serve_at_random(late.engine, "llama", rng, count=8, aborts=aborts)
    assert_cache_is_true(late.engine)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), tight=st.booleans())
def test_any_sampling_gives_what_it_gives_without(seed: int, tight: bool) -> None:
    """The same requests on an engine that waits for every batch."""
    rng = Random(seed)
    asked = [(f"r{i}", prompt, some_sampling(rng)) for i, prompt in enumerate(prompts(rng, 7))]
    blocks = 60 if tight else 256
    late = late_engine(make_policy("chaos", rng), blocks=blocks)
    sometimes_quick(late, rng)
    plain = make_engine("llama", ChaosPolicy(seed), grammars=grammar_compiler())
    for engine in (late.engine, plain):
        waiting = list(asked)
        while waiting:
            for request_id, prompt, params in waiting[:2]:
                engine.inbox.append(
                    AddRequest(
                        id=request_id,
                        prompt=list(prompt[:60]),
                        sampling=params,
                        arrival=engine.clock(),
                    )
                )
            del waiting[:2]
            for _ in range(rng.randint(0, 6)):
                engine.loop.step()
        engine.run()
        assert_at_rest(engine)
    for request_id, _, _ in asked:
        assert outcome(late.engine, request_id) == outcome(plain, request_id)
    assert_cache_is_true(late.engine)


def some_sampling(rng: Random) -> SamplingParams:
    fields: dict[str, object] = {"max_tokens": rng.choice((1, 2, 5, 12)), "temperature": 0.0}
    if rng.random() < 0.6:
        fields |= {"temperature": 0.9, "seed": rng.randrange(100), "top_p": 0.9}
    extra = rng.random()
    if extra < 0.1:
        fields["logprobs"] = 2
    elif extra < 0.2:
        fields["frequency_penalty"] = 0.5
    elif extra < 0.3:
        fields["grammar"] = Grammar("regex", "[a-d]{2,5}")
    elif extra < 0.5:
        fields |= {"min_tokens": rng.randint(1, 4), "logit_bias": {0: 3.0}}
    elif extra < 0.7:
        fields["stop_token_ids"] = [rng.randrange(1, VOCABULARY) for _ in range(12)]
    return SamplingParams(**fields)  # type: ignore[arg-type]


def outcome(engine: Engine, request_id: str) -> tuple[object, ...]:
    outputs = engine.outputs(request_id)
    return engine.tokens(request_id), outputs[-1].finish_reason, outputs[-1].stop_token


def sometimes_quick(late: LateEngine, rng: Random) -> None:
    """Now and then the device has got on by itself."""

    def get_on() -> None:
        if rng.random() < 0.2:
            late.device.finish(rng.randint(late.device.finished, len(late.device.enqueued)))

    if rng.random() < 0.7:
        late.engine.on_poll.append(get_on)


def assert_cache_is_true(engine: Engine) -> None:
    """The prefix cache holds beginnings of prompts and answers, by scope, and nothing else."""
    # Their KV is held to account by the prompts of these tests that begin with earlier ones.
    texts = [
        (request.cache_scope, *request.prompt, *engine.tokens(request.id))
        for request in engine.asked
        if engine.rejected(request.id) is None
    ]

    def visit(node: object, path: tuple[int, ...]) -> None:
        for key, child in node.children.items():  # type: ignore[attr-defined]
            whole = path + key
            assert any(text[: len(whole)] == whole for text in texts), whole
            visit(child, whole)

    visit(engine.parts.kv._tree._root, ())


def steady(late: LateEngine, requests: int, tokens: int) -> LateEngine:
    """Streams that decode together until all of them end."""
    for index in range(requests):
        late.engine.add(f"s{index}", [3 + index, 5], max_tokens=tokens, ignore_eos=True)
    late.engine.run()
    for index in range(requests):
        assert len(late.engine.tokens(f"s{index}")) == tokens
    return late


def test_the_device_has_work_between_steps() -> None:
    """While the host books and decides, the next batch is there; only the first finds nothing."""
    config = PolicyConfig(boundary_tokens=16)
    ahead = steady(late_engine(create_policy("length-aware", config, CostModel())), 3, 40)
    waits = steady(
        late_engine(create_policy("length-aware", config, CostModel()), async_scheduling=False),
        3,
        40,
    )
    assert len(ahead.executor.batches) == len(waits.executor.batches) == 40
    assert ahead.device.gaps == 1
    assert waits.device.gaps == 40
    counted = ahead.engine.loop._telemetry
    assert (counted.steps_ahead, dict(counted.steps_waited)) == (39, {"nothing": 1})
    assert not waits.engine.loop._telemetry.steps_waited


def test_the_last_token_by_length_is_not_run_beyond() -> None:
    """40 tokens take 40 batches, the prefill among them: see above. A stop costs one more."""
    late = late_engine(ChaosPolicy(0, express=0.0))
    prompt = (5, 6, 7)
    text = expected("llama", prompt, 30)
    stop = text[3]
    late.engine.add("x", prompt, max_tokens=30, stop_token_ids=[stop])
    late.engine.run()
    assert late.engine.tokens("x") == text[: text.index(stop) + 1]
    assert late.engine.outputs("x")[-1].finish_reason == "stop"
    assert len(late.executor.batches) == text.index(stop) + 2
    assert_at_rest(late.engine)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"frequency_penalty": 0.4}, "penalties"),
        ({"grammar": Grammar("regex", "[a-d]{9}")}, "grammar"),
        ({"logprobs": 1}, "logprobs"),
    ],
)
def test_who_needs_the_host_is_waited_for(fields: dict[str, object], reason: str) -> None:
    late = late_engine(ChaosPolicy(1, express=0.0))
    late.engine.add("x", [5, 6, 7], max_tokens=9, ignore_eos=True, **fields)
    late.engine.run()
    counted = late.engine.loop._telemetry
    assert (counted.steps_ahead, dict(counted.steps_waited)) == (0, {reason: 9})


@pytest.mark.parametrize("at", range(1, 30))
def test_abort_at_any_poll(at: int) -> None:
    late = late_engine(ChaosPolicy(4, express=0.5), blocks=40)
    polls = had = 0

    def interfere() -> None:
        nonlocal polls, had
        polls += 1
        if polls == at:
            had = len(late.engine.tokens("x"))
            late.engine.abort("x")

    late.engine.on_poll.append(interfere)
    crowd = {f"c{i}": tuple(range(1 + i, 1 + i + size)) for i, size in enumerate((2, 50, 9))}
    late.engine.add("x", [7, 8, 9], max_tokens=12)
    for request_id, prompt in crowd.items():
        late.engine.add(request_id, prompt, max_tokens=12)
    late.engine.run()
    for request_id, prompt in crowd.items():
        assert late.engine.tokens(request_id) == expected("llama", prompt, 12)
    assert len(late.engine.tokens("x")) == had or polls < at
    assert (
        late.engine.tokens("x") == expected("llama", (7, 8, 9), 12)[: len(late.engine.tokens("x"))]
    )
    assert_at_rest(late.engine)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32), depth=st.sampled_from((2, 3)))
def test_shorts_wait_for_no_more_layers(seed: int, depth: int) -> None:
    """From the poll that brings a short to its own batch, the host enqueues at most as many layers
    as it is allowed to be ahead, less the one that it waits for; and no other batch behind the one
    that is enqueued already."""
    rng = Random(seed)
    config = PolicyConfig(boundary_tokens=8, long_share=0.01)
    policy = create_policy("length-aware", config, CostModel())
    late = late_engine(policy, depth=depth)
    device = late.device
    sent: list[str] = []
    longs: list[str] = []
    came: dict[str, int] = {}

    def arrive() -> None:
        if len(sent) < 6 and rng.random() < 0.3 and not late.engine.inbox:
            name = f"s{len(sent)}"
            sent.append(name)
            came[name] = len(device.enqueued)
            late.engine.add(name, [4, 5, 6 + len(sent)], max_tokens=rng.choice((1, 3)))

        if len(longs) < 4 and late.engine.emitted and rng.random() < 0.1:
            longs.append(f"long{len(longs)}")
            late.engine.add(longs[-1], [3 + len(longs), 4] * 60, max_tokens=9, ignore_eos=True)

    waited: list[int] = []
    prepare = late.engine.loop._preparation.prepare

    def watch(batch):  # type: ignore[no-untyped-def]
        before = late.engine.loop._settlement.dispatched
        if batch.kind is BatchClass.LONG and before is not None and before.whole:
            assert before.ended.done(), "a long batch is enqueued behind a running one"
        for chunk in batch.prefills:
            if chunk.request_id in came:
                since = device.enqueued[came.pop(chunk.request_id) :]
                waited.append(since.count("layer"))
                assert since.count("layer") <= depth - 1
                assert since.count("whole") == 0
        return prepare(batch)

    late.engine.loop._preparation.prepare = watch  # type: ignore[method-assign]
    late.engine.on_poll.append(arrive)
    late.engine.add("first", [3, 4] * 60, max_tokens=30, ignore_eos=True)
    for _ in range(8):
        late.engine.run()
    assert not came
    assert len(waited) == len(sent)
    assert_at_rest(late.engine)


def test_memory_that_runs_out_is_waited_for() -> None:
    late = late_engine(ChaosPolicy(3, express=0.2), blocks=30, prefix_cache=False)
    for index, prompt in enumerate(prompts(Random(5), 12)):
        late.engine.add(str(index), prompt[:60], max_tokens=40, ignore_eos=True)
    late.engine.run()
    counted = late.engine.loop._telemetry
    assert counted.recompute_preemptions > 0, "the test is too easy"
    assert counted.steps_waited["memory"] > 0, "the test is too easy"
    assert all(len(late.engine.tokens(str(index))) == 40 for index in range(12))
    assert_at_rest(late.engine)


def test_twins_share_their_blocks_when_nobody_reads_them_any_more() -> None:
    """A sequence whose prompt another one has cached meanwhile keeps its own blocks while a batch
    may read them, and its answer is cached in the end all the same, also if a stop token ends it
    when the next batch is enqueued already."""
    prompt = list(range(1, 3 * BLOCK + 1))

    def twins(**more: object) -> Engine:
        late = late_engine(create_policy("fcfs", PolicyConfig(), CostModel()))
        for name, seed in (("a", 1), ("b", 2)):
            late.engine.add(name, prompt, max_tokens=20, temperature=9.0, seed=seed, **more)
        late.engine.run()
        assert_at_rest(late.engine)
        return late.engine

    free = twins(ignore_eos=True)
    texts = [free.tokens(name) for name in ("a", "b")]
    stops = [
        next(t for t in text[9:] if all(t not in other[:9] for other in texts)) for text in texts
    ]
    engine = twins(ignore_eos=True, stop_token_ids=stops)
    for name in ("a", "b"):
        assert engine.outputs(name)[-1].finish_reason == "stop"
        assert len(engine.tokens(name)) > 9
        text = [*prompt, *engine.tokens(name)]
        assert engine.parts.kv.cached_prefix([*text, 1], "") == (len(text) - 1) // BLOCK * BLOCK


def test_a_broken_row_ends_its_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch behind it computes something for that row, since it is enqueued already."""
    late = late_engine(create_policy("fcfs", PolicyConfig(), CostModel()))
    runner = late_runner()
    forward = runner.forward

    def break_a_row(batch: FlatBatch, at_boundary: AtBoundary | None = None) -> torch.Tensor:
        logits = forward(batch, at_boundary).clone()
        rows = batch.tokens[batch.outputs]
        logits[: len(rows)][rows == 77] = torch.nan
        return logits

    monkeypatch.setattr(runner, "forward", break_a_row)
    late.engine.add("broken", [5, 6, 77])
    late.engine.add("sound", [5, 6, 7])
    late.engine.run()
    last = late.engine.outputs("broken")[-1]
    assert (last.tokens, last.finish_reason) == ([], "error")
    assert late.engine.tokens("sound") == expected("llama", (5, 6, 7), 8)
    assert late.engine.loop._telemetry.steps_ahead > 0
    assert_at_rest(late.engine)
