"""The leak benchmark's verdicts: it can say that something leaks, and that nothing does."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "leaks.py"
MIB = 2**20


@pytest.fixture(scope="module")
def leaks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leaks_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rests(leaks: ModuleType, mib_per_hour: float, noise: float = 0.1) -> list[Any]:
    """Ten minutes: a start that grows quickly, then a line with noise."""
    rng = random.Random(1)
    made = []
    for number in range(45):
        seconds = 13.3 * number
        mib = 500 + min(number, 10) + mib_per_hour * seconds / 3600 + rng.gauss(0, noise)
        made.append(leaks.Rest(seconds, {"engine": int(mib * MIB)}, {"engine": 9}, {"engine": 3}))
    return made


def test_memory_that_grows_steadily_is_told_from_a_warm_up(leaks: ModuleType) -> None:
    flat = leaks.trend(rests(leaks, 0.0), "engine")
    assert flat.flat
    assert flat.low < 0 < flat.high
    growing = leaks.trend(rests(leaks, 60.0), "engine")
    assert not growing.flat
    assert growing.low < 60 < growing.high


def test_a_line_through_noise_proves_nothing(leaks: ModuleType) -> None:
    """Too few rests, or too much noise, is not flat: the bound is what counts."""
    assert not leaks.trend(rests(leaks, 0.0)[:4], "engine").flat
    assert not leaks.trend(rests(leaks, 0.0, noise=40.0), "engine").flat


def test_files_and_threads_that_grow(leaks: ModuleType) -> None:
    made = rests(leaks, 0.0)
    assert leaks.grown(made, "files") == []
    made[40].files["engine"] = 10
    assert leaks.grown(made, "files") == []
    for rest in made[25:]:
        rest.files["engine"] = 10
    assert leaks.grown(made, "threads") == []
    [problem] = leaks.grown(made, "files")
    assert "files of the engine grow" in problem
