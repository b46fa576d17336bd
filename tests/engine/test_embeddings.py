"""Embeddings of prompts equal pooled states of the stock model, whatever the schedule does."""

from __future__ import annotations

from random import Random
from typing import get_args

import numpy as np
import pytest
import torch

from pla_serve.engine.run.pooling import HiddenPool
from pla_serve.wire.engine import Output, Pooling
from tests.engine.chaos import ChaosPolicy
from tests.engine.test_outputs import assert_at_rest, prompts
from tests.engine.tiny import Engine, expected, make_engine, reference_model

KINDS = get_args(Pooling)


def right(name: str, prompt: tuple[int, ...], kind: Pooling) -> torch.Tensor:
    with torch.inference_mode():
        states = reference_model(name).base_model(torch.tensor([prompt])).last_hidden_state[0]
    return {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[kind]


def only_output(engine: Engine, request_id: str) -> Output:
    (output,) = engine.outputs(request_id)
    return output


def assert_embedding(name: str, prompt: tuple[int, ...], kind: Pooling, output: Output) -> None:
    assert output.embedding is not None
    found = torch.from_numpy(np.frombuffer(output.embedding, "<f4").copy())
    torch.testing.assert_close(found, right(name, prompt, kind), atol=1e-3, rtol=1e-3)
    assert (output.tokens, output.finish_reason) == ([], "length")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules(name: str, seed: int) -> None:
    """Chunks, preemption in layers, little memory, prefix hits and texts beside them."""
    rng = Random(seed)
    blocks = rng.randint(30, 60) if seed % 2 else 256
    engine = make_engine(name, ChaosPolicy(seed), blocks=blocks)
    wanted = {f"r{i}": prompt for i, prompt in enumerate(prompts(rng, 8))}
    wanted |= {f"again {id}": prompt for id, prompt in wanted.items()}
    kinds = {each: rng.choice((None, *KINDS)) for each in wanted}
    waiting = list(wanted)

    def arrive() -> None:
        while waiting and rng.random() < 0.4:
            id = waiting.pop(0)
            tokens = 0 if kinds[id] else 4
            engine.add(id, wanted[id], max_tokens=tokens, embedding=kinds[id])

    engine.on_poll.append(arrive)
    while waiting:
        engine.run()
    engine.on_poll.clear()
    engine.run()
    for id, prompt in wanted.items():
        kind = kinds[id]
        if kind is None:
            assert engine.tokens(id) == expected(name, prompt, 4)
        else:
            assert_embedding(name, prompt, kind, only_output(engine, id))
    assert_at_rest(engine)


def test_only_the_last_token_needs_no_cached_prefix_computed() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    prompt = tuple(range(1, 42))
    engine.add("first", prompt)
    engine.run()
    for kind, cached in (("last", 40), ("mean", 0), ("cls", 0)):
        engine.add(kind, prompt, max_tokens=0, embedding=kind)
        engine.run()
        assert only_output(engine, kind).cached_tokens == cached
        assert_embedding("llama", prompt, kind, only_output(engine, kind))


def test_a_single_token_has_an_embedding() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    for kind in KINDS:
        engine.add(kind, (5,), max_tokens=0, embedding=kind)
    engine.run()
    for kind in KINDS:
        assert_embedding("llama", (5,), kind, only_output(engine, kind))


def test_an_embedding_with_output_is_refused() -> None:
    engine = make_engine("llama", ChaosPolicy(0))
    engine.add("r", (5, 6), max_tokens=3, embedding="last")
    engine.run()
    rejected = engine.rejected("r")
    assert rejected is not None
    assert "comes without output" in rejected.reason


def test_what_is_pooled_is_not_pooled_again_after_a_preemption() -> None:
    pool = HiddenPool.of("mean", 10)
    assert pool.wanted(0, 6) == (0, 6)
    pool.add(np.full(2, 6.0), 6)
    assert pool.next == 6
    assert pool.wanted(4, 4) == (2, 4), "two of them are there already"
    assert pool.wanted(0, 5) is None
    with pytest.raises(RuntimeError, match="6 of 10"):
        pool.mean()
    pool.add(np.full(2, 14.0), 4)
    assert pool.mean().tolist() == [2.0, 2.0]
