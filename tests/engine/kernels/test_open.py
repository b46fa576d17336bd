"""Which kernels an engine gets, and what is said where it gets lower ones or none."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pla_serve.engine.kernels import compile, levels, open
from pla_serve.engine.kernels.compile import compile_level, find_compiler
from pla_serve.engine.kernels.levels import (
    LEVELS,
    level_named,
    limits_of_torch,
    missing_features,
    runnable_levels,
    with_below,
)
from pla_serve.engine.kernels.open import open_kernels
from pla_serve.engine.kernels.vector import Vectors
from tests.engine.levels import NAMES, kernels_of

EVERYTHING = frozenset[str]().union(*(level.features for level in LEVELS))


@pytest.mark.parametrize("name", NAMES)
def test_each_level_opens_and_is_right(name: str) -> None:
    kernels = kernels_of(name)
    assert kernels.level == name
    assert kernels.vectors is not None
    assert (kernels.tiles is not None) == (name == "amx")


def test_levels_beyond_this_processor_compile(tmp_path: Path) -> None:
    beyond = [level for level in LEVELS if level not in runnable_levels()]
    try:
        compiler = find_compiler()
    except OSError as error:
        pytest.skip(str(error))
    for level in beyond[:1]:  # it has all sources of those below
        compile_level(level, tmp_path / "library.so", compiler)
        assert (tmp_path / "library.so").exists()


def test_a_processor_runs_all_levels_up_to_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "processor_features", lambda: EVERYTHING)
    assert runnable_levels() == LEVELS
    own = frozenset[str]().union(*(part.features for part in with_below(level_named("avx512"))))
    monkeypatch.setattr(levels, "processor_features", lambda: own)
    assert [level.name for level in runnable_levels()] == ["avx512", "avx2"]
    assert missing_features(level_named("avx512-bf16"), own) == {"avx512_bf16", "avx512_vnni"}
    monkeypatch.setattr(levels, "processor_features", lambda: frozenset())
    assert runnable_levels() == ()


def test_torch_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert open_kernels("torch").level == "torch"
    monkeypatch.setattr(levels, "processor_features", lambda: frozenset())
    with caplog.at_level(logging.WARNING):
        assert open_kernels("auto").level == "torch"
    assert not caplog.records, "nothing is amiss"


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not runnable_levels():
        pytest.skip("no level runs on this processor")
    monkeypatch.setattr(compile, "BUILT", tmp_path)
    monkeypatch.setenv("PLA_SERVE_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert open_kernels("auto").level == "torch"
    assert "no C++ compiler" in caplog.text
    monkeypatch.setenv("CXX", "/bin/false")
    assert open_kernels("auto").level == "torch"
    with pytest.raises(ValueError, match="does not work here"):
        open_kernels(runnable_levels()[0].name)


def test_a_library_of_the_wheel_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    brought = tmp_path / "avx2.so"
    brought.touch()
    monkeypatch.setattr(compile, "BUILT", tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert compile.library_of(level_named("avx2"), tmp_path / "cache") == brought
    with pytest.raises(OSError, match="no C\\+\\+ compiler"):
        compile.library_of(level_named("avx512"), tmp_path / "cache")


def test_a_level_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open, "processor_features", lambda: frozenset({"avx2", "fma", "f16c"}))
    with pytest.raises(ValueError, match=r"needs a processor with .*avx512f"):
        open_kernels("avx512")


def test_a_level_that_computes_wrongly_gives_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    top = runnable_levels()[:1]
    if not top:
        pytest.skip("no level runs on this processor")
    kernels_of(top[0].name)
    monkeypatch.setattr(Vectors, "is_right", lambda self: False)
    with caplog.at_level(logging.WARNING):
        assert open_kernels("auto").level == "torch"
    assert "wrong results" in caplog.text


def test_torch_is_held_to_the_level_too() -> None:
    assert limits_of_torch("auto") == limits_of_torch("torch") == {}
    program = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    shown = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | limits_of_torch("avx2"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() in ("AVX2", "DEFAULT", "NO AVX")
