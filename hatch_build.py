"""Compiles the CPU kernels into the wheel, so that `pip install` of it needs no compiler.

On Linux for x86-64 the wheel has a library for each level of instructions and is a platform wheel.
Elsewhere, or without a C++ compiler, it has none and fits any platform; kernels are then compiled
at the first start, or torch computes alone.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = "pla_serve/engine/kernels/built"
TAG = "py3-none-linux_x86_64"


class KernelsHook(BuildHookInterface[Any]):
    """Adds the compiled libraries to a wheel that is not editable."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile all levels; raises what the compiler raises."""
        self._scratch = tempfile.TemporaryDirectory()
        if version == "editable" or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            return
        sys.path.insert(0, str(Path(self.root, "src")))
        from pla_serve.engine.kernels.compile import compile_level, find_compiler
        from pla_serve.engine.kernels.levels import LEVELS

        try:
            compiler = find_compiler()
        except OSError as error:
            self.app.display_warning(f"the wheel has no compiled kernels: {error}")
            return
        for level in LEVELS:
            target = Path(self._scratch.name, f"{level.name}.so")
            compile_level(level, target, compiler)
            build_data["force_include"][str(target)] = f"{PLACE}/{target.name}"
        build_data["pure_python"] = False
        build_data["tag"] = TAG

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the libraries, which are in the wheel now."""
        self._scratch.cleanup()
