"""Tensors of a GGUF file under the names of ``transformers``, read from the file where they lie.

The conversion of a file writes a list of its tensors (`TENSORS`), so that a start need not parse
the file, which takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pla_serve.engine.loading.errors import ModelUnavailable, UnsupportedModel
from pla_serve.engine.loading.formats import BY_NAME, FLOATS
from pla_serve.engine.loading.source import read_json, some

TENSORS = "tensors.json"
"""File in the folder of a converted GGUF file: the file, and where its tensors lie."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file."""

    format: str
    shape: tuple[int, ...]
    """(out, in) of a matrix."""
    data: Bytes
    """All bytes of the tensor. They are part of the file, which is mapped into memory."""


class TensorFile:
    """The tensors of a GGUF file by name.

    Args:
        folder: folder that the conversion of the file has filled.

    Raises:
        ModelUnavailable: the file is gone, or another one than the one that was converted.
    """

    def __init__(self, folder: Path) -> None:
        listed = read_json(folder / TENSORS)
        self.path = Path(listed["file"])
        self._listed: dict[str, Any] = listed["tensors"]
        try:
            size = self.path.stat().st_size
            if size != listed["bytes"]:
                raise OSError(f"it has {size} bytes, not {listed['bytes']}")
            self._bytes: Bytes = np.memmap(self.path, np.uint8, mode="r")
        except OSError as error:
            raise ModelUnavailable(
                f"The weights in {self.path} cannot be read: {error}."
            ) from error

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self._listed)

    def read(self, name: str) -> StoredTensor:
        """Return a tensor; its bytes are read from the disk when they are used."""
        entry = self._listed[name]
        start, count = entry["offset"], entry["bytes"]
        return StoredTensor(
            entry["format"], tuple(entry["shape"]), self._bytes[start : start + count]
        )


def not_kept(folder: Path) -> list[str]:
    """Return the formats in a GGUF file that no kernel multiplies, sorted by name.

    Args:
        folder: folder that the conversion of the file has filled.
    """
    tensors = read_json(folder / TENSORS)["tensors"]
    found = {entry["format"] for entry in tensors.values()}
    return sorted(found - set(BY_NAME) - set(FLOATS))


def is_quantised(folder: Path) -> bool:
    """Whether a folder comes from a GGUF file with quantised weights."""
    if not (folder / TENSORS).is_file():
        return False
    tensors = read_json(folder / TENSORS)["tensors"]
    return any(entry["format"] not in FLOATS for entry in tensors.values())


def write_list(path: Path, tensors: Mapping[str, Any], folder: Path) -> None:
    """Write the list of ``tensors``, which a GGUF reader has found in the file at ``path``."""
    entries = {
        _name(name): {
            "format": tensor.tensor_type.name,
            "shape": [int(size) for size in reversed(tensor.shape)],
            "offset": int(tensor.data_offset),
            "bytes": int(tensor.n_bytes),
        }
        for name, tensor in tensors.items()
    }
    content = {"file": str(path.absolute()), "bytes": path.stat().st_size, "tensors": entries}
    (folder / TENSORS).write_text(json.dumps(content, indent=1), encoding="utf-8")


_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Parts of a layer of Llama, Qwen2 and Qwen3 in GGUF files, and in ``transformers``."""
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def _name(name: str) -> str:
    """Return the name of a tensor in ``transformers``; its own if it has no other."""
    base, _, kind = name.rpartition(".")
    if base in _WHOLE:
        return f"{_WHOLE[base]}.{kind}"
    words = base.split(".")
    if len(words) == 3 and words[0] == "blk" and words[2] in _PARTS:
        return f"model.layers.{words[1]}.{_PARTS[words[2]]}.{kind}"
    return name


def require_names(file: TensorFile, wanted: Iterable[str]) -> None:
    """Check that the file has all these tensors.

    Raises:
        UnsupportedModel: some are missing; the message names them.
    """
    if missing := sorted(set(wanted) - file.names()):
        raise UnsupportedModel(f"{file.path} lacks {len(missing)} weights: {some(missing)}.")
