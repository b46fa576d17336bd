"""Weights in modules: the right ones, in the right type, or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, LlamaConfig
from transformers.utils import logging as transformers_logging

from pla_serve.engine.loading import (
    ModelSource,
    ModelUnavailable,
    UnsupportedModel,
    eos_token_ids,
    load_model,
    load_tokenizer,
    most_positions,
    resolve_device,
    resolve_dtype,
    vocab_size,
)
from tests.engine.loading import tiny

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture
def saved(tmp_path: Path) -> ModelSource:
    tiny.model(tiny.config("Qwen3", tie_word_embeddings=True)).save_pretrained(tmp_path)
    return ModelSource("m", tmp_path, "here")


def dummy(folder: Path, family: str = "Llama") -> ModelSource:
    tiny.config(family).save_pretrained(folder)
    return ModelSource("m", folder, "here", dummy=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_saved_weights_are_loaded(saved: ModelSource, dtype: torch.dtype) -> None:
    model = load_model(saved, dtype, CPU, seed=0)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in load_file(saved.folder / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor.to(dtype)), name


def test_nothing_is_printed(saved: ModelSource, capfd: pytest.CaptureFixture[str]) -> None:
    transformers_logging.enable_progress_bar()
    capfd.readouterr()
    load_model(saved, torch.float32, CPU, seed=0)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled(), "others may want theirs"


def test_random_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    source = dummy(tmp_path)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (load_model(source, torch.float32, CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own draws are untouched
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert one(TOKENS).logits.isfinite().all()


def test_the_attention_is_the_callers(saved: ModelSource) -> None:
    calls: list[int] = []

    def attention(module, query, key, value, mask, **_):  # type: ignore[no-untyped-def]
        calls.append(module.layer_idx)
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("pla_test_zeros", attention)
    model = load_model(saved, torch.float32, CPU, 0, attn_implementation="pla_test_zeros")
    model(TOKENS, use_cache=False)
    assert calls == [0, 1]


def test_a_missing_weight_is_an_error_not_a_random_number(saved: ModelSource) -> None:
    file = saved.folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(saved, torch.float32, CPU, 0)


@pytest.mark.parametrize("keep", [0, 20, 4000])
def test_a_weight_file_cut_short_is_an_error(saved: ModelSource, keep: int) -> None:
    file = saved.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load_model(saved, torch.float32, CPU, 0)


def test_weights_of_another_shape_are_an_error(saved: ModelSource) -> None:
    path = saved.folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "intermediate_size": 96}))
    with pytest.raises(UnsupportedModel, match=r"6 weights .* another shape.*mlp\.down_proj"):
        load_model(saved, torch.float32, CPU, 0)


def test_an_unsupported_model_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="gemma2"):
        load_model(dummy(tmp_path, "Gemma2"), torch.float32, CPU, 0)


def test_types_and_devices() -> None:
    cuda = torch.device("cuda")
    assert resolve_dtype("auto", CPU) is torch.float32
    assert resolve_dtype("auto", cuda) is torch.bfloat16
    assert resolve_dtype("bfloat16", CPU) is torch.bfloat16
    assert resolve_dtype("float32", cuda) is torch.float32
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="no torch device"):
        resolve_device("abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="finds no CUDA device"):
        resolve_device("cuda:0")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [5, 3]}, {"eos_token_id": 3}, (3, 5)),
        ({}, {"eos_token_id": 3}, (3,)),
        (None, {"eos_token_id": [7]}, (7,)),
        (None, {"eos_token_id": None}, ()),
        ({"eos_token_id": -1}, {"eos_token_id": 4}, (4,)),
    ],
)
def test_end_tokens(
    tmp_path: Path,
    generation: dict[str, object] | None,
    config: dict[str, object],
    expected: tuple[int, ...],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert eos_token_ids(ModelSource("m", tmp_path, "here")) == expected


def write_tokenizer_files(folder: Path, eos: object, *, added: bool) -> None:
    token = "<|im_end|>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    vocabulary = {"a": 0, "b": 1} | ({} if added else {token: 2})
    tokens = [{"id": 9, "content": token}] if added else []
    content = {"added_tokens": tokens, "model": {"vocab": vocabulary}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
@pytest.mark.parametrize(("added", "end"), [(True, 9), (False, 2)])
def test_the_end_token_of_the_tokenizer_counts_too(
    tmp_path: Path, eos: object, added: bool, end: int
) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0}')
    write_tokenizer_files(tmp_path, eos, added=added)
    assert eos_token_ids(ModelSource("m", tmp_path, "here")) == (0, end)


def test_an_end_token_of_the_tokenizer_that_has_no_id(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    write_tokenizer_files(tmp_path, "<|other|>", added=True)
    assert eos_token_ids(ModelSource("m", tmp_path, "here")) == (1,)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert eos_token_ids(ModelSource("m", tmp_path, "here")) == (1,)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 128),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 512),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, 512),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            256,
        ),
        (
            {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            128,
        ),
    ],
    ids=["plain", "linear", "yarn", "yarn-original", "llama3"],
)
def test_positions_with_scaling(rope: dict[str, object], most: int) -> None:
    assert most_positions(LlamaConfig(max_position_embeddings=128, rope_parameters=rope)) == most


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(dummy(tmp_path)) is None
    with pytest.raises(UnsupportedModel, match="holds no tokenizer"):
        load_tokenizer(ModelSource("m", tmp_path, "here"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="cannot be loaded"):
        load_tokenizer(ModelSource("m", tmp_path, "here"))


def test_the_vocabulary_is_that_of_the_embedding_or_unknown(tmp_path: Path) -> None:
    tiny.config("Llama", vocab_size=320).save_pretrained(tmp_path)
    source = ModelSource("m", tmp_path, "here")
    assert vocab_size(source) == 320
    (tmp_path / "config.json").write_text('{"model_type": "of tomorrow"}')
    assert vocab_size(source) is None
    (tmp_path / "config.json").unlink()
    assert vocab_size(source) is None
