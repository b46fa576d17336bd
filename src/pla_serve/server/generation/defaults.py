"""Sampling parameters of requests that give none, from the model's generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

FILE = "generation_config.json"
AUTO = "auto"
NONE = "vllm"
"""Name under which vLLM knows the defaults that no file has changed."""


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Fields of a generation config that requests without them get.

    Other fields of the file are left alone, as vLLM leaves them.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    max_new_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    """Most output tokens of any request, whatever it asks for, as in vLLM."""

    def __str__(self) -> str:
        found = msgspec.structs.asdict(self)
        named = [f"{name} {value:g}" for name, value in found.items() if value is not None]
        return ", ".join(named) or "none"


class _Override(SamplingDefaults, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling defaults given by ``--override-generation-config``, in which an unknown name is an
    error."""


def read_defaults(choice: str, override: str | None, folder: Path) -> SamplingDefaults:
    """Return the defaults that the flags choose.

    Args:
        choice: ``auto`` for the file in the model's folder, if there is one; ``vllm`` for none;
            else a folder with such a file.
        override: JSON object of fields that go before those of the file; None for none.
        folder: of the model.

    Raises:
        ValueError: a file or ``override`` has a value out of range, or the named folder no file.
    """
    found = SamplingDefaults()
    if choice != NONE:
        path = (folder if choice == AUTO else Path(choice)) / FILE
        if path.is_file():
            found = _decode(path.read_bytes(), SamplingDefaults, str(path))
        elif choice != AUTO:
            raise ValueError(
                f"there is no {path}; --generation-config takes auto, vllm or a folder"
            )
    if override is None:
        return found
    changes = _decode(override.encode(), _Override, "--override-generation-config")
    named = {name: v for name, v in msgspec.structs.asdict(changes).items() if v is not None}
    return msgspec.structs.replace(found, **named)


def _decode(content: bytes, kind: type[SamplingDefaults], where: str) -> SamplingDefaults:
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        cure = "" if kind is _Override else " (--generation-config vllm reads no file)"
        raise ValueError(f"{where}: {error}{cure}") from None
