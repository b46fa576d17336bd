"""From settings to tokens: a folder of a tiny model through the whole of the engine."""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from pla_serve.engine.build import execution, stored_profile
from pla_serve.engine.build.engine import EngineCore
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.kv.manager import BlockTable, KVManager
from pla_serve.engine.kv.sizing import GIB, plan_kv
from pla_serve.engine.run.executor import BatchExecutor
from pla_serve.policy.config import PolicyConfig
from pla_serve.wire.engine import (
    AddRequest,
    EngineReady,
    EngineStats,
    Inbound,
    Outbound,
    Output,
    SamplingParams,
)
from tests.engine.tiny import CONFIGS, SIZES, expected, reference_model, write_tokenizer

CPU = torch.device("cpu")
SHAPE = KVShape(layers=2, heads=2, head_dim=8, dtype=torch.float32)


def serve_one(config: EngineConfig, prompt: tuple[int, ...]) -> tuple[EngineReady, list[int]]:
    """Start an engine and ask for eight greedy tokens."""
    inbox: deque[Inbound] = deque()
    emitted: list[Outbound] = []

    def poll() -> list[Inbound]:
        messages = list(inbox)
        inbox.clear()
        return messages

    core = EngineCore(config, inbox=poll, emit=emitted.append)
    ready = emitted[0]
    assert isinstance(ready, EngineReady)
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    inbox.append(AddRequest(id="x", prompt=list(prompt), sampling=sampling, arrival=0.0))
    while core.step() is not None:
        pass
    return ready, [t for o in emitted if isinstance(o, Output) for t in o.tokens]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama without a tokenizer: prompts are token ids."""
    reference_model("llama").save_pretrained(tmp_path)
    return tmp_path


def test_dummy_weights_are_the_same_each_time(folder: Path) -> None:
    config = EngineConfig(
        model=str(folder), load_format="dummy", kv_cache_gib=0.001, threads=1, seed=5
    )
    first, tokens = serve_one(config, (1, 2, 3))
    _, again = serve_one(config, (1, 2, 3))
    assert tokens == again
    assert (first.dtype, first.device, first.policy) == ("float32", "cpu", "length-aware")
    assert first.vocab_size == CONFIGS["llama"]().vocab_size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts_starts_with_dummy_weights(tmp_path: Path, dtype: str) -> None:
    settings = CONFIGS["qwen2-moe"]()
    settings.output_router_logits = True  # as for training
    settings.save_pretrained(tmp_path)
    config = EngineConfig(
        model=str(tmp_path), load_format="dummy", kv_cache_gib=0.001, threads=1, dtype=dtype
    )
    ready, tokens = serve_one(config, (1, 2, 3))
    assert ready.dtype == dtype
    assert 1 <= len(tokens) <= 8


def test_experts_are_read_from_files_with_one_tensor_each(tmp_path: Path) -> None:
    for name in ("mixtral", "qwen3-moe"):
        folder = tmp_path / name
        reference_model(name).save_pretrained(folder, max_shard_size="20KB")
        write_tokenizer(folder)
        index = (folder / "model.safetensors.index.json").read_text()
        assert ".experts.3." in index
        config = EngineConfig(model=str(folder), kv_cache_gib=0.001, threads=1)
        assert tuple(serve_one(config, (1, 2, 3))[1]) == expected(name, (1, 2, 3), 8)


def test_bfloat16_runs_and_float32_is_exact(folder: Path, tokenizer_files: None) -> None:
    config = EngineConfig(model=str(folder), kv_cache_gib=0.001, threads=1)
    _, tokens = serve_one(config, (1, 2, 3))
    assert tuple(tokens) == expected("llama", (1, 2, 3), 8)
    narrow = EngineConfig(model=str(folder), kv_cache_gib=0.001, threads=1, dtype="bfloat16")
    ready, tokens = serve_one(narrow, (1, 2, 3))
    assert ready.dtype == "bfloat16"
    assert 1 <= len(tokens) <= 8


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep the pages")
def test_no_kv_of_the_warm_up_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the warm-up wrote is given back; batches of requests find zeros, as in a new cache."""
    caches: list[KVCache] = []
    written: list[bool] = []

    class Watched(KVCache):
        def __init__(self, shape: KVShape, slots: int, device: torch.device) -> None:
            super().__init__(shape, slots, device)
            caches.append(self)

        def forget(self) -> None:
            written.append(bool(self.keys[0].any()))
            super().forget()

    monkeypatch.setattr(execution, "KVCache", Watched)
    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        kv_cache_gib=0.001,
        threads=1,
        seed=5,
        stored_profile=False,
    )
    EngineCore(config, inbox=lambda: [], emit=lambda _: None)
    (cache,) = caches
    assert written == [True]
    assert not any(bool(part.any()) for part in (*cache.keys, *cache.values))


@pytest.fixture
def tokenizer_files(folder: Path) -> None:
    """What a folder of real weights must have."""
    write_tokenizer(folder)


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_a_scaled_context_is_served_to_its_end(
    tmp_path: Path, kind: Literal["yarn", "linear"]
) -> None:
    """The config names 128 positions and a factor of 4; a prompt of 300 tokens is exact."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    sizes = {**SIZES, "max_position_embeddings": 128, "rope_parameters": rope}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    prompt = [1 + 7 * place % 90 for place in range(300)]
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 300:]
    config = EngineConfig(model=str(tmp_path), kv_cache_gib=0.004, threads=1, max_model_len=512)
    ready, tokens = serve_one(config, tuple(prompt))
    assert ready.max_model_len == 512
    assert tokens == wanted.tolist()


def test_learned_positions_are_not_exceeded_at_start(tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=96, n_positions=200, n_embd=32, n_layer=2, n_head=4, eos_token_id=0
    )
    config.save_pretrained(tmp_path)
    served = EngineConfig(model=str(tmp_path), load_format="dummy", kv_cache_gib=0.001, threads=1)
    ready, tokens = serve_one(served, (5,) * 199)
    assert ready.max_model_len == 200
    assert len(tokens) == 1


def test_what_the_allocator_keeps_is_given_back_before_memory_is_shared_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fused layers leave the memory of stock ones behind, which the driver counts as used."""
    free = [10 * GIB]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(60 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 80 * GIB))
    plan = plan_kv(EngineConfig(), SHAPE, torch.device("cuda"), positions=64)
    assert plan.blocks == int(60 * GIB * 0.85) // (16 * SHAPE.bytes_per_token)


def test_kv_memory_bounds_the_model_length() -> None:
    config = EngineConfig(kv_cache_gib=100 * 16 * SHAPE.bytes_per_token / GIB)
    plan = plan_kv(config, SHAPE, CPU, positions=1_000_000)
    assert (plan.blocks, plan.short_reserve, plan.max_model_len) == (100, 5, 95 * 16)
    assert plan_kv(config, SHAPE, CPU, positions=64).max_model_len == 64


@given(
    blocks=st.integers(1, 400),
    block_tokens=st.integers(1, 40),
    reserve=st.floats(0, 0.9),
    positions=st.integers(2, 3000),
)
def test_whatever_is_admitted_fits_even_as_a_long(
    blocks: int, block_tokens: int, reserve: float, positions: int
) -> None:
    """Else it would be parked for ever."""
    gib = (blocks + 0.5) * block_tokens * SHAPE.bytes_per_token / GIB
    config = EngineConfig(kv_cache_gib=gib, block_tokens=block_tokens, short_kv_reserve=reserve)
    try:
        plan = plan_kv(config, SHAPE, CPU, positions)
    except ValueError as error:
        assert "no room for KV" in str(error)  # noqa: PT017
        return
    kv = KVManager(plan.blocks, block_tokens)
    everything = list(range(plan.max_model_len))
    assert kv.reserve(everything, BlockTable(), spare=plan.short_reserve) == 0


def test_the_longest_prompt_and_the_longest_output_are_served(folder: Path) -> None:
    config = EngineConfig(
        model=str(folder),
        load_format="dummy",
        kv_cache_gib=20 * 16 * 2 * 3 * 2 * 8 * 4 / GIB,
        short_kv_reserve=0.3,
        threads=1,
        policy_config=PolicyConfig(boundary_tokens=8),
    )
    ready, _ = serve_one(config, (1, 2, 3))
    assert (ready.kv_tokens, ready.max_model_len) == (20 * 16, 14 * 16)
    _, tokens = serve_one(config, (5,) * (14 * 16 - 1))
    assert len(tokens) == 1


@pytest.mark.parametrize(
    ("config", "positions", "message"),
    [
        (EngineConfig(max_model_len=65), 64, "exceeds the 64 positions"),
        (EngineConfig(kv_cache_gib=1e-9), 64, "raise kv_cache_gib"),
        (EngineConfig(kv_cache_gib=1e-4, max_model_len=4096), 8192, "lower max_model_len"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure(
    config: EngineConfig, positions: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan_kv(config, SHAPE, CPU, positions)


def test_a_bound_of_no_queued_tokens_is_refused_rather_than_taken_as_none() -> None:
    with pytest.raises(ValueError, match="max_queued_tokens must be at least 1"):
        EngineConfig(max_queued_tokens=0)


def test_shapes_by_name_on_a_cpu(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The static path from the settings to the tokens, decode steps included."""
    prompt = (5, 17, 3, 8, 60, 22)
    caplog.set_level("INFO")
    write_tokenizer(folder)
    config = EngineConfig(
        model=str(folder), device="cpu", kv_cache_gib=0.001, capture_shapes="1x1,8x2"
    )
    _, tokens = serve_one(config, prompt)
    assert tuple(tokens) == expected("llama", prompt, 8)
    assert "captured 2 shapes up to 8 tokens" in caplog.text


def test_a_backend_that_does_not_run_here_is_refused(folder: Path) -> None:
    write_tokenizer(folder)
    config = EngineConfig(model=str(folder), device="cpu", attention_backend="triton")
    with pytest.raises(ValueError, match="triton needs a CUDA device"):
        serve_one(config, (1, 2))


def _taken(inbox: deque[Inbound]) -> list[Inbound]:
    messages = list(inbox)
    inbox.clear()
    return messages


def test_the_second_start_has_a_stored_profile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It serves at once, with the same tokens, and warms up while it is idle."""
    for bound in ("SAME_SPEED", "NEAR_ROOFLINE"):  # measurements of a loaded machine vary
        monkeypatch.setattr(stored_profile, bound, 1e12)
    monkeypatch.setenv("PLA_SERVE_CACHE", str(tmp_path / "cache"))
    config = EngineConfig(
        model=str(folder), load_format="dummy", kv_cache_gib=0.001, threads=1, cpu_kernels="torch"
    )
    batches: list[int] = []
    forward = BatchExecutor.forward

    def counted(self: BatchExecutor, requests: Any, *args: Any) -> Any:
        batches.append(len(requests))
        return forward(self, requests, *args)

    monkeypatch.setattr(BatchExecutor, "forward", counted)
    measured, tokens = serve_one(config, (1, 2, 3))
    emitted: list[Outbound] = []
    inbox: deque[Inbound] = deque()
    batches.clear()
    core = EngineCore(config, inbox=lambda: _taken(inbox), emit=emitted.append)
    assert not batches
    assert isinstance(emitted[0], EngineReady)
    assert (measured.cost_profile, emitted[0].cost_profile) == ("measured", "stored")
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    inbox.append(AddRequest(id="x", prompt=[1, 2, 3], sampling=sampling, arrival=0.0))
    while core.step() is not None:
        pass
    assert [t for o in emitted if isinstance(o, Output) for t in o.tokens] == tokens
    warming = [o.warming_up for o in emitted if isinstance(o, EngineStats)]
    assert (warming[0], warming[-1]) == (True, False)
    apart, _ = serve_one(replace(config, stored_profile=False), (1, 2, 3))
    assert apart.cost_profile == "measured"
