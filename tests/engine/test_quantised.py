"""Models whose weights stay quantised: tokens are those of the floats they stand for."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.attention.vector import attention_of
from pla_serve.engine.build.quantised import load_kept, quantise_at_load
from pla_serve.engine.kernels.quantised import Quantised
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.layers import cpu
from pla_serve.engine.layers.cpu.quantised import QuantisedLinear, copied_bytes, quantised_memory
from pla_serve.engine.loading import UnsupportedModel, check_supported, decoder_layers, resolve
from pla_serve.engine.loading import gguf as gguf_cache
from pla_serve.engine.loading.convert import convert
from pla_serve.engine.loading.gguf import kept
from pla_serve.engine.loading.progress import NoLoadingProgress
from pla_serve.engine.run.runner import ModelRunner
from tests.engine import quantised
from tests.engine.chaos import ChaosPolicy
from tests.engine.levels import kernels_of
from tests.engine.loading import tiny as tiny_gguf
from tests.engine.tiny import BLOCK, make_engine

BLOCKS = 64
TOKENS = 8
VOCABULARY = 300
EOS = 1
MIXTURES = {
    "Llama": ("Q4_K", "Q6_K", "Q5_K"),
    "Qwen2": ("Q4_0", "Q5_1", "Q8_0"),
    "Qwen3": ("Q4_1", "Q5_0", "Q6_K"),
}


@pytest.fixture(scope="module")
def kernels() -> Quantised:
    found = kernels_of("avx2").quantised
    assert found is not None
    return found


def runner_of(model: torch.nn.Module, level: str = "avx2") -> ModelRunner:
    shape = check_supported(model.config)
    layers = decoder_layers(model, shape.layers)
    assert cpu.optimise(model, kernels_of(level)) == len(layers)
    memory = KVShape(shape.layers, shape.kv_heads, shape.head_dim, torch.float32)
    cache = KVCache(memory, BLOCKS * BLOCK, torch.device("cpu"))
    for part in (*cache.keys, *cache.values):
        part.fill_(torch.nan)
    return ModelRunner(model, layers, cache, attention_of(kernels_of(level)))


def prompts() -> list[tuple[int, ...]]:
    random = Random(0)
    lengths = (1, 5, 17, 40)
    return [tuple(random.choices(range(3, VOCABULARY), k=length)) for length in lengths]


def expected(reference: torch.nn.Module, prompt: tuple[int, ...]) -> tuple[int, ...]:
    with torch.inference_mode():
        output = reference.generate(
            torch.tensor([prompt]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=EOS
        )
    return tuple(output[0, len(prompt) :].tolist())


def check_schedules(runner: ModelRunner, reference: torch.nn.Module) -> None:
    """Random chunks, batches and express work: tokens equal those of the reference."""
    right = [expected(reference, prompt) for prompt in prompts()]
    for seed in range(2):
        engine = make_engine(
            "llama",
            ChaosPolicy(seed, express=0.05),
            blocks=BLOCKS,
            runner_of=runner,
            vocabulary=VOCABULARY,
            eos=EOS,
        )
        for index, prompt in enumerate(prompts()):
            engine.add(str(index), prompt, max_tokens=TOKENS)
        engine.run()
        for index, tokens in enumerate(right):
            assert engine.tokens(str(index)) == tokens, index


@pytest.mark.parametrize("family", MIXTURES)
def test_tokens_are_those_of_the_dequantised_weights(
    tmp_path: Path, family: str, kernels: Quantised
) -> None:
    formats = MIXTURES[family]
    quantised.write(tmp_path / "m.gguf", family, lambda name: formats[len(name) % 3])
    source = quantised.source_of(tmp_path / "m.gguf", tmp_path / "folder")
    model = load_kept(source, torch.float32, kernels, IMPLEMENTATION)
    runner = runner_of(model)
    assert set(quantised_memory(model)) <= set(formats)
    called_whole = [layer.whole is not None for layer in decoder_layers(model, 2)]
    assert all(called_whole) == (family != "Qwen3")  # which has norms of queries and keys
    if family == "Llama":  # its file has the order that the kernels want
        assert copied_bytes(model) == 0
    check_schedules(runner, quantised.reference_of(source))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_safetensors_are_quantised_at_load(kind: str, kernels: Quantised) -> None:
    def fresh(attention: str) -> Any:
        settings = tiny_gguf.config("Llama", **quantised.SIZES, tie_word_embeddings=True)
        return AutoModelForCausalLM.from_config(settings, attn_implementation=attention).eval()

    model, reference = fresh(IMPLEMENTATION), fresh("eager")
    model.requires_grad_(False)
    quantise_at_load(model, kind, kernels)  # type: ignore[arg-type]
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            (weight,) = module.weights
            floats = torch.from_numpy(quantised.floats_of(weight.format, weight.rows))
            weights[f"{name.removesuffix('.linear')}.weight"] = floats
    reference.load_state_dict(weights, strict=False)
    check_schedules(runner_of(model), reference)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts_are_quantised_at_load(kind: str, kernels: Quantised) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

    def fresh(attention: str) -> Any:
        settings = tiny_gguf.config("Qwen3Moe", **quantised.SIZES, **experts)
        return AutoModelForCausalLM.from_config(settings, attn_implementation=attention).eval()

    model, reference = fresh(IMPLEMENTATION), fresh("eager")
    model.requires_grad_(False)
    quantise_at_load(model, kind, kernels)  # type: ignore[arg-type]
    floats: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            (weight,) = module.weights
            rows = torch.from_numpy(quantised.floats_of(weight.format, weight.rows))
            floats[f"{name.removesuffix('.linear')}.weight"] = rows
    weights = {name: rows for name, rows in floats.items() if ".experts." not in name}
    for layer in range(len(model.model.layers)):
        place = f"model.layers.{layer}.mlp.experts"
        weights[f"model.layers.{layer}.mlp.gate.weight"] = model.model.layers[layer].mlp.gate.weight
        gated = [
            torch.cat([floats[f"{place}.gated.{e}.{part}.weight"] for part in ("gate", "up")])
            for e in range(4)
        ]
        down = [floats[f"{place}.down.{e}.weight"] for e in range(4)]
        weights[f"{place}.gate_up_proj"] = torch.stack(gated)
        weights[f"{place}.down_proj"] = torch.stack(down)
    reference.load_state_dict(weights, strict=False)
    check_schedules(runner_of(model), reference)


def test_experts_of_odd_sizes_are_not_quantised(kernels: Quantised) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    settings = tiny_gguf.config("Qwen3Moe", **quantised.SIZES, **experts)
    model = AutoModelForCausalLM.from_config(settings).requires_grad_(False)
    with pytest.raises(ValueError, match=r"experts with 40 inputs.*leave out --quantization"):
        quantise_at_load(model, "int8", kernels)


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversions happen in this process, into a cache of the test."""
    monkeypatch.setenv("PLA_SERVE_CACHE", str(tmp_path / "cache"))

    def convert_here(path: Path, folder: Path, _: object, *, weights: bool = True) -> None:
        convert(path, folder, weights=weights)

    monkeypatch.setattr(gguf_cache, "convert", convert_here)


@pytest.mark.usefixtures("in_process")
def test_a_format_that_is_not_served_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    source = tiny_gguf.model(tiny_gguf.config("Llama", **quantised.SIZES))
    kind = GGMLQuantizationType.Q2_K

    def quantise(name: str, weights: np.ndarray) -> tuple[np.ndarray, GGMLQuantizationType]:
        return np.zeros((len(weights), weights.shape[1] // 256 * 84), np.uint8), kind

    tiny_gguf.write_gguf(path, source, quantise=quantise)
    with pytest.raises(UnsupportedModel, match=r"Q2_K.*Drop --quantization keep"):
        kept(path, "keep", NoLoadingProgress())
    assert kept(path, "auto", NoLoadingProgress()) is None
    assert kept(path, "none", NoLoadingProgress()) is None


@pytest.mark.usefixtures("in_process")
def test_the_engine_process_finds_the_same_file(tmp_path: Path) -> None:
    quantised.write(tmp_path / "m.gguf", "Qwen2", lambda name: "Q8_0")
    source = resolve(str(tmp_path / "m.gguf"), keep="auto")
    assert source.kept == tmp_path / "m.gguf"
    again = resolve(source.path, source.load_format, keep="auto")
    assert (again.folder, again.kept) == (source.folder, source.kept)
    floats = resolve(source.path, source.load_format)
    assert floats.kept is None
    assert floats.folder != source.folder


@pytest.mark.usefixtures("in_process")
def test_a_file_of_floats_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tiny_gguf.write_gguf(path, tiny_gguf.model(tiny_gguf.config("Llama", head_dim=16)))
    assert kept(path, "auto", NoLoadingProgress()) is None
    with pytest.raises(UnsupportedModel, match="none of its weights are quantised"):
        kept(path, "keep", NoLoadingProgress())
