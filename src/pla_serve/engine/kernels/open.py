"""Opens the CPU kernels of a level at start: found or compiled, loaded, checked against torch."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from pla_serve.engine.kernels.amx import Tiles
from pla_serve.engine.kernels.compile import library_of
from pla_serve.engine.kernels.few import FewTokens
from pla_serve.engine.kernels.levels import (
    Level,
    LevelName,
    level_named,
    missing_features,
    processor_features,
    runnable_levels,
)
from pla_serve.engine.kernels.quantised import Quantised
from pla_serve.engine.kernels.vector import Vectors
from pla_serve.engine.loading.cache import cache_root

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CpuKernels:
    """Kernels that an engine on a CPU computes with. Where one is None, torch computes instead."""

    level: LevelName = "torch"
    tiles: Tiles | None = None
    """Matrix unit, for float32 linears and attention of many tokens."""
    vectors: Vectors | None = None
    """Vector units, for what lies between linears."""
    few: FewTokens | None = None
    """Vector units, for linears of few tokens."""
    quantised: Quantised | None = None
    """Linears of weights that stay quantised."""


TORCH_ALONE = CpuKernels()


def open_kernels(asked: str = "auto") -> CpuKernels:
    """Return the kernels of a level.

    Args:
        asked: name of a level, or ``auto`` for the highest that works here. ``auto`` falls back to
            lower levels, and to torch alone, and the log says why.

    Raises:
        ValueError: the level that was asked for does not work here. The message says why.
    """
    if asked == "torch":
        log.info("CPU kernels: torch's own")
        return TORCH_ALONE
    if asked != "auto":
        return _open_forced(level_named(asked))
    levels = runnable_levels()
    for level in levels:
        kernels = _open(level)
        if isinstance(kernels, CpuKernels):
            log.info("CPU kernels: %s", level.name)
            return kernels
        log.warning("CPU kernels: not %s: %s", level.name, kernels)
    log.info("CPU kernels: torch's own%s", "" if levels else "; none fit this processor")
    return TORCH_ALONE


def _open_forced(level: Level) -> CpuKernels:
    lacking = missing_features(level, processor_features())
    if lacking:
        raise ValueError(
            f"--cpu-kernels {level.name} needs a processor with {', '.join(sorted(lacking))}; "
            "choose a lower level, or auto"
        )
    kernels = _open(level)
    if isinstance(kernels, str):
        raise ValueError(f"--cpu-kernels {level.name} does not work here: {kernels}; use auto")
    log.info("CPU kernels: %s, as asked", level.name)
    return kernels


def _open(level: Level) -> CpuKernels | str:
    """Return the kernels of a level that this processor can run, or why they cannot be used."""
    try:
        library = load(level)
        tiles = Tiles(library) if level.name == "amx" else None
    except subprocess.CalledProcessError as error:
        return f"the compiler failed: {error.stderr.decode(errors='replace').strip()[:500]}"
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    vectors, few, quantised = Vectors(library), FewTokens(library), Quantised(library)
    for part in (tiles, vectors, few, quantised):
        if part is not None and not part.is_right():
            return (
                f"its {type(part).__name__.lower()} kernels compute wrong results on this machine"
            )
    return CpuKernels(level.name, tiles, vectors, few, quantised)


def load(level: Level) -> ctypes.CDLL:
    """Return the loaded library of a level.

    Raises:
        OSError: there is no compiler, or the library cannot be written or loaded.
        subprocess.SubprocessError: the compiler failed, or took too long.
    """
    # The library takes the symbols of OpenMP from whatever is loaded globally, and torch loads its
    # OpenMP for itself alone.
    for openmp in sorted(Path(torch.__file__).parent.parent.rglob("torch*/lib*/libgomp*.so*"))[:1]:
        ctypes.CDLL(str(openmp), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library_of(level, cache_root() / "kernels")))
