"""Keeps the cost profile that a start has measured, for the next start on the same machine.

A file in the user's cache holds one profile, with the key of what it was measured for and the
ceilings of the device at that time. A start uses it only if the key is the same, if the device is
about as fast as it was, and if its predictions are not far from the roofline's. Any other file is
left alone, and the log says why.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path

import msgspec
import torch

from pla_serve.engine.build.model import RankModel
from pla_serve.engine.build.roofline import Ceilings
from pla_serve.engine.build.settings import RankSettings
from pla_serve.environment import cpu_model, usable_cores
from pla_serve.policy.cost import TYPICAL, CostModel, CostProfile, Work

log = logging.getLogger(__name__)

MOST_BYTES = 2**14
"""Size of a file above which it is not read. One of ours has about 1 KiB."""
MOST_FILES = 64
"""Profiles that are kept. The ones that were written first make room."""
SAME_SPEED = 4.0
"""Factor by which a ceiling may differ from the stored one. On a shared machine it varies."""
NEAR_ROOFLINE = 300.0
"""Factor by which predictions may differ from the roofline's. Measured ones differ by up to 30."""


class ProfileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Content of a file."""

    key: dict[str, str]
    """What the profile holds for; see `profile_key`."""
    ceilings: Ceilings
    """Speed of the device when the profile was measured."""
    profile: CostProfile
    bulk: CostProfile
    """See `CostModel.bulk`."""


def profile_key(settings: RankSettings, model: RankModel) -> dict[str, str]:
    """Return all that decides what batches take: processor, kernels, threads, model, versions."""
    config = settings.config
    return {
        "processor": cpu_model(),
        "cores": str(usable_cores()),
        "kernels": model.kernels.level,
        "threads": str(torch.get_num_threads()),
        "ranks": str(settings.ranks.size),
        "dtype": str(settings.dtype),
        "model": str(model.size),
        "kv": str(model.kv_shape),
        "windows": str(model.windows),
        "vocabulary": str(model.vocab_size),
        "quantised": str(model.quantised),
        "attention": config.attention_backend,
        "compiled": str(config.compile_layers),
        "block_tokens": str(config.block_tokens),
        **{name: metadata.version(name) for name in ("pla-serve", "torch", "transformers")},
    }


@dataclass(frozen=True, slots=True)
class ProfileStore:
    """The file of one machine, model and settings."""

    folder: Path
    key: Mapping[str, str]
    ceilings: Ceilings
    """Speed of the device now."""
    roofline: CostProfile
    """Predictions that follow from it."""

    @property
    def path(self) -> Path:
        """Path of the file, which need not exist."""
        text = repr(sorted(self.key.items()))
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def read(self) -> CostModel | None:
        """Return a cost model with the stored profile, or None if there is none that holds here."""
        try:
            record = self._load()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, msgspec.DecodeError) as error:
            log.warning("the stored cost profile %s is not used: %s", self.path, error)
            return None
        return CostModel(record.profile, record.bulk)

    def _load(self) -> ProfileRecord:
        """Return the content of the file.

        Raises:
            OSError: it cannot be read.
            ValueError, msgspec.DecodeError: it does not hold here; the message says why.
        """
        with self.path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        record = msgspec.json.decode(content, type=ProfileRecord)
        if record.key != self.key:
            raise ValueError("it is for another machine, model or setting")
        if not _alike(astuple(record.ceilings), astuple(self.ceilings), SAME_SPEED):
            raise ValueError("this machine was much slower or faster when it was measured")
        expected = _typical_seconds(self.roofline)
        for profile in (record.profile, record.bulk):
            if not _alike(_typical_seconds(profile), expected, NEAR_ROOFLINE):
                raise ValueError("it is far from what this machine can do")
        return record

    def write(self, cost: CostModel) -> None:
        """Store the profile of ``cost``. If that fails the log says why, and nothing else happens.

        The file appears complete or not at all, also if several engines start at once.
        """
        record = ProfileRecord(
            key=dict(self.key), ceilings=self.ceilings, profile=cost.profile, bulk=cost.bulk
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._replace(msgspec.json.encode(record))
            self._make_room()
        except OSError as error:
            log.warning("the cost profile cannot be stored in %s: %s", self.folder, error)

    def _replace(self, content: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(name).replace(self.path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise

    def _make_room(self) -> None:
        """Delete the oldest files, those of writers that were killed included."""
        files = sorted(self.folder.iterdir(), key=lambda file: file.stat().st_mtime)
        for file in files[:-MOST_FILES]:
            with suppress(OSError):  # another engine has deleted it
                file.unlink()


def _typical_seconds(profile: CostProfile) -> tuple[float, ...]:
    cost = CostModel(profile)
    return tuple(cost.work_seconds(*Work(*batch)) for batch in TYPICAL.tolist())


def _alike(found: tuple[float, ...], expected: tuple[float, ...], factor: float) -> bool:
    """Return whether no number differs from its expected one by more than a factor."""
    return all(
        0 < a <= factor * b and b <= factor * a for a, b in zip(found, expected, strict=True)
    )
