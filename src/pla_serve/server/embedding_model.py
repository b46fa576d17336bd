"""How a model makes embeddings, as the files of sentence-transformers beside its weights say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pla_serve.wire.engine import Pooling

MODULES = "modules.json"
CONFIG = "config.json"
MODES: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
"""Kinds of pooling that are served, and what they are called here."""


class EmbeddingModel(msgspec.Struct, frozen=True):
    """How texts become vectors.

    Without such files they do by their last token, which has seen all others.
    """

    pooling: Pooling = "last"
    refusal: str | None = None
    """Why this model makes no embeddings here; None if it does."""
    dimensions: tuple[int, ...] | None = ()
    """Sizes to which its vectors may be cut; None: any. Empty: it was not trained for that."""


class _Module(msgspec.Struct):
    type: str = ""
    path: Annotated[str, Meta(max_length=200)] = ""


class _Config(msgspec.Struct):
    """Fields of ``config.json``, under the names that vLLM reads."""

    is_matryoshka: bool | None = None
    matryoshka_dimensions: list[int] | None = None


def read_embedding_model(folder: Path) -> EmbeddingModel:
    """Return how the model in this folder makes embeddings.

    Raises:
        ValueError: a file is broken.
    """
    config = _decode(folder / CONFIG, _Config) or _Config()
    sizes = tuple(config.matryoshka_dimensions or ())
    made = EmbeddingModel(dimensions=sizes or (None if config.is_matryoshka else ()))
    for module in _decode(folder / MODULES, list[_Module]) or []:
        kind = module.type.rpartition(".")[2]
        if kind == "Pooling":
            made = _pooled(folder / module.path / CONFIG, made)
        elif kind not in ("Transformer", "Normalize"):
            reason = f"{MODULES} has a module {module.type}, which is not computed here"
            made = msgspec.structs.replace(made, refusal=reason)
    return made


def _pooled(path: Path, made: EmbeddingModel) -> EmbeddingModel:
    found: dict[str, Any] = _decode(path, dict[str, Any]) or {}
    modes = [
        name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for name, on in found.items()
        if name.startswith("pooling_mode_") and on is True
    ]
    if named := found.get("pooling_mode"):  # as newer files have it: one, or a list
        modes = [str(mode) for mode in (named if isinstance(named, list) else [named])]
    if len(modes) != 1 or modes[0] not in MODES:
        reason = f"its pooling ({', '.join(modes) or 'none'}) is not one of {', '.join(MODES)}"
        return msgspec.structs.replace(made, refusal=reason)
    return msgspec.structs.replace(made, pooling=MODES[modes[0]])


def _decode(path: Path, kind: Any) -> Any:
    """Return the content of a JSON file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
