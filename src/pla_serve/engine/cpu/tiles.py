"""Builds and calls `tiles.cpp`: float32 linears on processors whose matrix unit takes bfloat16."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch

from pla_serve.engine.loading.cache import cache_root

log = logging.getLogger(__name__)

After = Literal["none", "swish", "add", "mul"]

NEEDED = frozenset({"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512vl", "avx512_bf16"})
"""As Linux names what the processor can do."""
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-mavx512f", "-mavx512bw"),
    *("-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
)
COMPILERS = ("c++", "g++", "clang++")
BUILD_SECONDS = 120.0
MULTIPLE = 32
"""Inputs and outputs of a linear come in multiples of it."""
PARTS = 3
"""Bfloat16 numbers whose sum is a float32 number; weights from smaller types need fewer."""
_AFTER: dict[After, int] = {"none": 0, "swish": 1, "add": 2, "mul": 3}


class TileWeight:
    """A weight (out, in) in parts, in the order in which the matrix unit takes them."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        parts: list[torch.Tensor] = []
        rest = weight
        while len(parts) < 2 or (len(parts) < PARTS and rest.any()):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1].float()
        self.parts = len(parts)
        blocks = [p.view(self.outputs // 16, 16, self.inputs // 32, 16, 2) for p in parts]
        ordered = [block.permute(0, 2, 3, 1, 4) for block in blocks]
        self.tiles = torch.stack(ordered, dim=2).contiguous()

    @staticmethod
    def fits(weight: torch.Tensor) -> bool:
        """Whether the kernel takes linears of this type and size."""
        sizes = all(size % MULTIPLE == 0 for size in weight.shape)
        return weight.dtype == torch.float32 and sizes


class Tiles:
    """The compiled kernel. `open` gives one where the machine has what it needs."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count = ctypes.c_void_p, ctypes.c_long
        self._linear = library.tiles_linear
        self._linear.restype = None
        self._linear.argtypes = [pointer, count, count, count, pointer, ctypes.c_int, pointer]
        self._linear.argtypes += [ctypes.c_int, pointer, pointer]

    @classmethod
    def open(cls) -> Tiles | None:
        """None, with the reason in the log, where linears have to do without it."""
        if not _processor_flags() >= NEEDED:
            return None
        try:
            library = ctypes.CDLL(str(_build(cache_root() / "kernels")))
            if library.tiles_open() != 0:
                raise OSError("the system does not grant the use of AMX")
            tiles = cls(library)
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("float32 prefill is slower than it could be: no AMX kernel (%s)", error)
            return None
        if not _is_right(tiles):
            log.warning("the AMX kernel computes wrong results on this machine; it is not used")
            return None
        return tiles

    def linear(
        self,
        inputs: torch.Tensor,
        weight: TileWeight,
        bias: torch.Tensor | None,
        after: After = "none",
        other: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(tokens, in) to (tokens, out), then ``after``, of which add and mul take ``other``."""
        inputs = inputs.contiguous()
        outputs = inputs.new_empty(inputs.shape[0], weight.outputs)
        other = None if other is None else other.contiguous()
        self._linear(
            inputs.data_ptr(),
            inputs.shape[0],
            weight.inputs,
            weight.outputs,
            weight.tiles.data_ptr(),
            weight.parts,
            None if bias is None else bias.data_ptr(),
            _AFTER[after],
            None if other is None else other.data_ptr(),
            outputs.data_ptr(),
        )
        return outputs


def _processor_flags() -> frozenset[str]:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(found.partition(":")[2].split())


def _build(folder: Path) -> Path:
    """The library, compiled once for each source, compiler and torch.

    Raises:
        OSError: there is no compiler, or the folder cannot be written.
        subprocess.SubprocessError: the compiler failed, or took too long.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if compiler is None:
        raise OSError(f"no C++ compiler; install one of {', '.join(COMPILERS)}, or set CXX")
    source = files(__package__).joinpath("tiles.cpp").read_bytes()
    # With torch's own OpenMP, so that both use the same threads.
    libraries = sorted(Path(torch.__file__).parent.rglob("libgomp*.so*"))[:1]
    command = [compiler, *FLAGS]
    identity = repr((source, command, libraries, torch.__version__)).encode()
    target = folder / f"tiles-{hashlib.sha256(identity).hexdigest()[:16]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made, code = Path(scratch) / "tiles.so", Path(scratch) / "tiles.cpp"
            code.write_bytes(source)
            words = [*command, "-o", str(made), str(code), *map(str, libraries)]
            subprocess.run(words, check=True, capture_output=True, timeout=BUILD_SECONDS)
            made.replace(target)
    return target


def _is_right(tiles: Tiles) -> bool:
    """On a small product, against float64."""
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (torch.randn(rows, 96, generator=generator) for rows in (40, 64))
    exact = (inputs.double() @ weight.double().t()).float()
    return torch.allclose(tiles.linear(inputs, TileWeight(weight), None), exact, 1e-4, 1e-4)
