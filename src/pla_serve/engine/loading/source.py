"""Files of a model on this machine, and the check that all are there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pla_serve.engine.loading.errors import ModelUnavailable, UnsupportedModel

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine. Small and picklable, because it is sent to the engine process."""

    name: str
    """Name under which clients ask for the model, unless the user gives another."""
    folder: Path
    """Folder of the config, and of safetensors and tokenizer if there are any."""
    origin: str
    """Text for people that says where the model came from."""
    config_file: str = "config.json"
    """Name of the config in ``folder``."""
    dummy: bool = False
    """Whether weights are random instead of read from safetensors."""
    kept: Path | None = None
    """GGUF file whose weights stay quantised; ``folder`` lists where they lie. None: floats."""

    @property
    def path(self) -> str:
        """Path by which `resolve` finds the same model again."""
        if self.kept is not None:
            return str(self.kept)
        return str(self.folder / self.config_file if self.dummy else self.folder)

    @property
    def load_format(self) -> Literal["safetensors", "gguf", "dummy"]:
        """Load format that goes with ``path``."""
        if self.kept is not None:
            return "gguf"
        return "dummy" if self.dummy else "safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ModelUnavailable: the file cannot be read.
        UnsupportedModel: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelUnavailable(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def require_weights(folder: Path) -> None:
    """Check that a folder holds a config and every safetensors file that its index names.

    Raises:
        ModelUnavailable: a file is missing; the message says which, and what to do.
    """
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(
            f"{folder} holds no config.json, so it is not a model folder."
            + _gguf_hint(folder)
            + _adapter_hint(folder)
        )
    if (folder / INDEX).is_file():
        shards = set(read_json(folder / INDEX).get("weight_map", {}).values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise ModelUnavailable(
                f"{folder} lacks {len(missing)} of {len(shards)} weight files: "
                f"{some(missing)}. Fetch them again."
            )
    elif not (folder / "model.safetensors").is_file():
        raise ModelUnavailable(
            f"{folder} holds no model.safetensors. Weights in pickle files are not loaded, because "
            "they can run code: convert them with transformers' save_pretrained. "
            "For random weights use --load-format dummy." + _gguf_hint(folder)
        )


def some(names: list[str]) -> str:
    """Return the first names as text for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _gguf_hint(folder: Path) -> str:
    files = sorted(folder.glob("*.gguf"))
    return f" To serve a GGUF file, name it: {files[0]}." if files else ""


def _adapter_hint(folder: Path) -> str:
    if not (folder / "adapter_config.json").is_file():
        return ""
    return " It is an adapter: merge it into its base model first."
