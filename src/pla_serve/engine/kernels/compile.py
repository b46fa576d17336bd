"""Compiles the kernels of a level to one shared library.

This module does not import torch, so that the build of a wheel can use it. The library is not
linked with OpenMP: its symbols are those of the OpenMP that torch has loaded, so that both use the
same threads.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pla_serve.engine.kernels.levels import Level, with_below

SOURCES = Path(__file__).parent / "sources"
BUILT = Path(__file__).parent / "built"
"""Folder of the libraries that a wheel brings; a clone has none."""
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp")
BUILD_SECONDS = 240.0


def library_of(level: Level, folder: Path) -> Path:
    """Return the library of a level: that of the wheel, or one in ``folder``, compiled if missing.

    Raises:
        OSError: there is no compiler, or the folder cannot be written.
        subprocess.SubprocessError: the compiler failed, or took too long.
    """
    brought = BUILT / f"{level.name}.so"
    if brought.exists():
        return brought
    compiler = find_compiler()
    flags = _flags(level)
    sources = _sources(level)
    content = [(path.name, path.read_bytes()) for path in sources]
    digest = hashlib.sha256(repr((content, compiler, flags)).encode()).hexdigest()
    target = folder / f"{level.name}-{digest[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        compile_level(level, target, compiler)
    return target


def compile_level(level: Level, target: Path, compiler: str) -> None:
    """Compile the sources of a level to the library ``target``, which appears when it is complete.

    Raises:
        OSError: the compiler cannot be run, or the folder of ``target`` cannot be written.
        subprocess.SubprocessError: the compiler failed, or took too long.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        units = [path for path in _sources(level) if path.suffix == ".cpp"]
        objects = [Path(scratch, f"{unit.parent.name}-{unit.stem}.o") for unit in units]

        def compile_unit(unit: Path, made: Path) -> None:
            words = [compiler, *_flags(level), "-c", str(unit), "-o", str(made)]
            subprocess.run(words, check=True, capture_output=True, timeout=BUILD_SECONDS)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, units, objects))
        linked = Path(scratch, target.name)
        words = [compiler, "-shared", "-o", str(linked), *map(str, objects)]
        subprocess.run(words, check=True, capture_output=True, timeout=BUILD_SECONDS)
        linked.replace(target)


def find_compiler() -> str:
    """Return the C++ compiler: that of ``CXX``, or the first that is installed.

    Raises:
        OSError: there is none.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise OSError(f"no C++ compiler; install one of {', '.join(COMPILERS)}, or set CXX")
    return compiler


def _flags(level: Level) -> tuple[str, ...]:
    below = with_below(level)
    return (*FLAGS, *(flag for part in below for flag in part.flags))


def _sources(level: Level) -> list[Path]:
    """Return the C++ files of a level and of those below it, headers included, in order."""
    folders = [SOURCES / name for part in with_below(level) for name in part.folders]
    return [path for folder in folders for path in sorted(folder.iterdir())]
