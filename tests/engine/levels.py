"""Kernels of each level, for tests: compiled once, skipped by name where they cannot run."""

from __future__ import annotations

from functools import cache

import pytest

from pla_serve.engine.kernels.compile import find_compiler
from pla_serve.engine.kernels.levels import (
    LEVELS,
    level_named,
    missing_features,
    processor_features,
)
from pla_serve.engine.kernels.open import CpuKernels, open_kernels

NAMES = tuple(level.name for level in LEVELS)


def kernels_of(name: str) -> CpuKernels:
    """The kernels of a level; skips the test if this machine cannot run or compile them."""
    lacking = missing_features(level_named(name), processor_features())
    if lacking:
        pytest.skip(f"{name} needs {', '.join(sorted(lacking))}")
    try:
        find_compiler()
    except OSError as error:
        pytest.skip(f"{name}: {error}")
    return _opened(name)


@cache
def _opened(name: str) -> CpuKernels:
    return open_kernels(name)
