"""What the GPU benchmark needs on a machine, and how to bring along what is missing.

A machine that is lent for measurements often has torch, Triton and transformers in its image,
nothing else, and no way to install more. What is missing there can be carried: fetched on another
machine into ``benchmarks/.carried`` as wheels (37 MB), copied with the repository, and unpacked
there. What the image has goes first.
"""

from __future__ import annotations

import atexit
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "benchmarks" / ".carried"
PACKAGES = {
    "msgspec": "msgspec",
    "zmq": "pyzmq",
    "psutil": "psutil",
    "rich": "rich",
    "pygments": "pygments",
    "markdown_it": "markdown-it-py",
    "mdurl": "mdurl",
    "scipy": "scipy",
    "gguf": "gguf",
}
"""Modules beside torch and transformers, and the packages that bring them."""
IMAGE = ("torch", "transformers", "numpy")
"""Modules that are too large to carry."""


def use_carried() -> None:
    """Make the project and what was carried importable, behind what the machine has."""
    if find_spec("pla_serve") is None:
        sys.path.insert(0, str(ROOT / "src"))
    wheels = sorted(CARRIED.glob("*.whl"))
    if wheels:
        folder = tempfile.mkdtemp(prefix="pla-serve-carried-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        sys.path.append(folder)


def missing() -> list[str]:
    """Return a line for each module that cannot be imported, with what to do about it."""
    lines = [
        f"{module} is missing, and the benchmark does not run without it: install it"
        for module in IMAGE
        if find_spec(module) is None
    ]
    lacking = [module for module in PACKAGES if find_spec(module) is None]
    if lacking:
        lines.append(
            f"missing: {', '.join(lacking)}. On a machine with a network, run "
            f"`python benchmarks/gpu.py --carry {_python()}`, and copy benchmarks/.carried here"
        )
    return lines


def remarks() -> list[str]:
    """Return a line for each thing whose absence changes what is measured, without an error."""
    lines = []
    if find_spec("triton") is None:
        lines.append("Triton is missing: fused layers and attention run on torch's operations")
    elif not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        lines.append("there is no C compiler: Triton cannot build its launchers, torch's are used")
    if find_spec("flashinfer") is None:
        lines.append("FlashInfer is missing: it is not among the attention backends that are tried")
    return lines


def carry(python: str) -> int:
    """Fetch what the benchmark needs for Linux on x86-64 and this version of Python.

    Args:
        python: as in ``3.12``.

    Returns:
        The exit status of pip.
    """
    if not re.fullmatch(r"3\.\d+", python):
        print(f"--carry wants a version of Python, as in 3.12, not {python}", file=sys.stderr)
        return 2
    shutil.rmtree(CARRIED, ignore_errors=True)
    constraints = ROOT / "constraints.txt"
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--dest", str(CARRIED), "--only-binary", ":all:", "--implementation", "cp"),
        *("--python-version", python, "--constraint", str(constraints)),
    ]
    for tag in ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"):
        command += ["--platform", tag]
    return subprocess.run([*command, *PACKAGES.values()], check=False).returncode


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
