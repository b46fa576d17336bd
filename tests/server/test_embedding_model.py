"""How a model makes embeddings is read from the files that sentence-transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pla_serve.server.embedding_model import EmbeddingModel, read_embedding_model

TRANSFORMER = {
    "idx": 0,
    "name": "0",
    "path": "",
    "type": "sentence_transformers.models.Transformer",
}
POOLING = {
    "idx": 1,
    "name": "1",
    "path": "1_Pooling",
    "type": "sentence_transformers.models.Pooling",
}
NORMALIZE = {
    "idx": 2,
    "name": "2",
    "path": "2_Normalize",
    "type": "sentence_transformers.models.Normalize",
}


def read(folder: Path, pooling: dict[str, Any], *more: dict[str, Any]) -> EmbeddingModel:
    (folder / "modules.json").write_text(json.dumps([TRANSFORMER, POOLING, *more]))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return read_embedding_model(folder)


def test_a_language_model_is_pooled_by_its_last_token(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert read_embedding_model(tmp_path) == EmbeddingModel("last", None, ())


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_pooling_is_that_of_the_file(tmp_path: Path, config: dict[str, Any], kind: str) -> None:
    assert read(tmp_path, config, NORMALIZE) == EmbeddingModel(kind, None, ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean, cls"),
        ({"pooling_mode": ["mean", "max"]}, "mean, max"),
        ({"pooling_mode": 3}, "3"),
        ({}, "none"),
    ],
)
def test_other_pooling_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], name: str
) -> None:
    refusal = read(tmp_path, config).refusal
    assert refusal is not None
    assert f"({name})" in refusal


def test_a_further_layer_is_refused_by_name(tmp_path: Path) -> None:
    dense = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    refusal = read(tmp_path, {"pooling_mode_mean_tokens": True}, dense).refusal
    assert refusal is not None
    assert "Dense" in refusal


@pytest.mark.parametrize(
    ("config", "sizes"),
    [({"is_matryoshka": True}, None), ({"matryoshka_dimensions": [64, 32]}, (64, 32))],
)
def test_sizes_are_those_that_the_model_was_trained_for(
    tmp_path: Path, config: dict[str, Any], sizes: tuple[int, ...] | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_embedding_model(tmp_path).dimensions == sizes


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json"):
        read_embedding_model(tmp_path)
