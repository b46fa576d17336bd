"""Quantised weights for tests: rows of every format, and tiny GGUF files that have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from pla_serve.engine.loading import ModelSource, load_config
from pla_serve.engine.loading.convert import convert
from pla_serve.engine.loading.formats import BY_NAME, WeightFormat
from pla_serve.engine.loading.tensors import Bytes, StoredTensor, TensorFile
from tests.engine.loading import tiny

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
"""Rows are multiples of 256, as K formats need."""


def rows_of(form: WeightFormat, weights: np.ndarray, seed: int = 0) -> Bytes:
    """Rows of a format: of these weights, or random ones of about their size in K formats."""
    kind = GGMLQuantizationType(form.number)
    if form.weights == 32:
        return gguf.quants.quantize(weights.astype(np.float32), kind)
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (weights.size // 256, form.bytes), dtype=np.uint8)
    # Scales of about 2 ** -k times those of the groups, for weights of about the wanted size.
    scale = np.float16(weights.std() / {"Q4_K": 250, "Q5_K": 500, "Q6_K": 1400}[form.name])
    where = (208,) if form.name == "Q6_K" else (0, 2)
    for at, value in zip(where, (scale, np.float16(scale * 7)), strict=False):
        blocks[:, at : at + 2] = np.frombuffer(value.tobytes(), np.uint8)
    return blocks.reshape(len(weights), -1)


def floats_of(form: WeightFormat, rows: Bytes) -> np.ndarray:
    """The weights of the rows, by the gguf package."""
    return gguf.quants.dequantize(rows, GGMLQuantizationType(form.number))


def write(path: Path, family: str, format_of: Callable[[str], str]) -> None:
    """Write a GGUF file of a tiny model of this family; ``format_of`` says how, by name."""

    def quantise(name: str, weights: np.ndarray) -> tuple[np.ndarray, GGMLQuantizationType]:
        form = BY_NAME[format_of(name)]
        return rows_of(form, weights, len(name)), GGMLQuantizationType(form.number)

    settings = tiny.config(family, **SIZES, tie_word_embeddings=family == "Llama")
    tiny.write_gguf(path, tiny.model(settings), quantise=quantise)


def source_of(path: Path, folder: Path) -> ModelSource:
    """The source of a GGUF file whose weights stay quantised."""
    folder.mkdir(exist_ok=True)
    convert(path, folder, weights=False)
    return ModelSource("m", folder, "here", kept=path)


def reference_of(source: ModelSource) -> torch.nn.Module:
    """The stock model with the floats that the weights of the file stand for."""
    config = load_config(source)
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    file = TensorFile(source.folder)
    weights = {name: torch.from_numpy(_floats(file.read(name))) for name in file.names()}
    if config.model_type == "llama":
        for name, weight in weights.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                pairs = weight.view(-1, config.head_dim // 2, 2, weight.shape[1])
                weights[name] = pairs.transpose(1, 2).reshape(weight.shape)
    found = model.load_state_dict(weights, strict=False)
    assert set(found.missing_keys) <= {"lm_head.weight"}
    assert not found.unexpected_keys
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]


def _floats(stored: StoredTensor) -> np.ndarray:
    if stored.format == "F32":
        return np.frombuffer(stored.data.tobytes(), np.float32).reshape(stored.shape).copy()
    rows = np.array(stored.data).reshape(stored.shape[0], -1)
    return floats_of(BY_NAME[stored.format], rows)
