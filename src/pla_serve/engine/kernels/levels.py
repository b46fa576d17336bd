"""Levels of CPU kernels: which instructions each one uses, and which this processor has.

Every level has all instructions of those below it, so a machine can run any level up to its own.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LevelName = Literal["amx", "avx512-bf16", "avx512", "avx2", "torch"]
"""``torch`` means that there are no kernels of our own."""


@dataclass(frozen=True, slots=True)
class Level:
    """A level: instructions that kernels use, and how compiler and libraries name them.

    Example: a processor without bfloat16 instructions, but with 512-bit registers, has the level
    ``avx512``.
    """

    name: LevelName
    features: frozenset[str]
    """Features of the processor, as Linux names them, beyond those of the levels below."""
    flags: tuple[str, ...]
    """Flags of the compiler, beyond those of the levels below."""
    folders: tuple[str, ...]
    """Folders in ``sources/`` with files that only this level and those above it compile."""
    onednn: str
    """Name of the level for oneDNN (``ONEDNN_MAX_CPU_ISA``), which torch computes with."""
    aten: str
    """Name of the level for torch's own kernels (``ATEN_CPU_CAPABILITY``)."""


LEVELS = (
    Level(
        "amx",
        frozenset({"amx_tile", "amx_bf16"}),
        ("-mamx-tile", "-mamx-bf16"),
        ("amx",),
        "AVX512_CORE_AMX",
        "avx512",
    ),
    Level(
        "avx512-bf16",
        frozenset({"avx512_bf16", "avx512_vnni"}),
        ("-mavx512bf16", "-mavx512vnni"),
        (),
        "AVX512_CORE_BF16",
        "avx512",
    ),
    Level(
        "avx512",
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        (),
        "AVX512_CORE",
        "avx512",
    ),
    Level(
        "avx2",
        frozenset({"avx2", "fma", "f16c"}),
        ("-mavx2", "-mfma", "-mf16c"),
        ("vector", "quantised"),
        "AVX2",
        "avx2",
    ),
)
"""All levels with kernels, from the highest to the lowest."""


def level_named(name: str) -> Level:
    """Return the level of this name.

    Raises:
        KeyError: there is none.
    """
    return {level.name: level for level in LEVELS}[name]  # type: ignore[index]


def with_below(level: Level) -> tuple[Level, ...]:
    """Return the level and all levels below it, the lowest first."""
    return LEVELS[LEVELS.index(level) :][::-1]


def processor_features() -> frozenset[str]:
    """Return the features of this processor as Linux names them; none on other systems."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def missing_features(level: Level, features: frozenset[str]) -> frozenset[str]:
    """Return what a processor with these ``features`` lacks for the level."""
    needed = frozenset[str]().union(*(part.features for part in with_below(level)))
    return needed - features


def runnable_levels() -> tuple[Level, ...]:
    """Return the levels that this processor can run, the highest first."""
    features = processor_features()
    return tuple(level for level in LEVELS if not missing_features(level, features))


def limits_of_torch(name: str) -> dict[str, str]:
    """Return environment variables that keep torch's kernels at a level as well.

    They matter to a process that has not multiplied yet. ``auto`` and ``torch`` set no limit.
    """
    if name in ("auto", "torch"):
        return {}
    level = level_named(name)
    return {"ONEDNN_MAX_CPU_ISA": level.onednn, "ATEN_CPU_CAPABILITY": level.aten}
