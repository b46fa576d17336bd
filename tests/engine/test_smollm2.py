"""The default model under a schedule that decides at random: tokens equal those of transformers."""

from __future__ import annotations

from random import Random

import pytest
import torch

from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.attention.sdpa import SdpaCpu
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.layers import cpu
from pla_serve.engine.loading import (
    ConsoleProgress,
    ModelSource,
    check_supported,
    decoder_layers,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
)
from pla_serve.engine.loading.finder import DEFAULT_MODEL
from pla_serve.engine.run.runner import ModelRunner
from tests.engine.chaos import ChaosPolicy
from tests.engine.tiny import BLOCK, make_engine

pytestmark = pytest.mark.model

BLOCKS = 128
TOKENS = 8
EOS = 2
CPU = torch.device("cpu")
STEM = (
    "The lighthouse keeper wrote down every ship that passed, its flag, its course and the hour, "
    "and read the list aloud to his dog in the evening. "
)
PROMPTS = (
    "Water boils at",
    STEM,
    STEM + "One night in March the list was longer than ever before, because",
    STEM * 2 + "The dog",
    "def fibonacci(n):\n    ",
)


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return resolve(DEFAULT_MODEL, progress=ConsoleProgress())


@pytest.fixture(scope="module")
def prompts(source: ModelSource) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    return [tuple(tokenizer(text)["input_ids"]) for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(source: ModelSource, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedy continuations by ``transformers.generate`` in float32."""
    model = load_model(source, torch.float32, CPU, 0, attn_implementation="eager")
    found = []
    for prompt in prompts:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=EOS
            )
        found.append(tuple(output[0, len(prompt) :].tolist()))
    return found


@pytest.fixture(scope="module")
def runner(source: ModelSource) -> ModelRunner:
    """As the engine builds it, with a small cache in which what was not written is NaN."""
    attention = check_supported(load_config(source))
    model = load_model(source, torch.float32, CPU, 0, attn_implementation=IMPLEMENTATION)
    cpu.optimise(model)
    layers = decoder_layers(model, attention.layers)
    assert all(isinstance(layer, cpu.FusedLayer) for layer in layers)
    shape = KVShape(attention.layers, attention.kv_heads, attention.head_dim, torch.float32)
    cache = KVCache(shape, BLOCKS * BLOCK, CPU)
    for memory in (*cache.keys, *cache.values):
        memory.fill_(torch.nan)
    return ModelRunner(model, layers, cache, SdpaCpu())


@pytest.mark.parametrize("seed", range(3))
def test_random_schedules(
    seed: int,
    runner: ModelRunner,
    prompts: list[tuple[int, ...]],
    expected: list[tuple[int, ...]],
    source: ModelSource,
) -> None:
    """Random chunks, batches, express work at random layers, arrivals in the middle of batches."""
    rng = Random(seed)
    engine = make_engine(
        "llama",
        ChaosPolicy(seed, express=0.05),
        blocks=BLOCKS,
        runner_of=runner,
        vocabulary=int(load_config(source).vocab_size),
        eos=EOS,
    )
    waiting = list(enumerate(prompts))
    rng.shuffle(waiting)

    def arrive() -> None:
        if waiting and rng.random() < 0.1:
            index, prompt = waiting.pop()
            engine.add(str(index), prompt, max_tokens=TOKENS)

    engine.on_poll.append(arrive)
    while waiting:
        engine.run()
    engine.on_poll.clear()
    engine.run()
    for index, right in enumerate(expected):
        assert engine.tokens(str(index)) == right, PROMPTS[index]
