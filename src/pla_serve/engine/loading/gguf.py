"""Converts GGUF files to folders of safetensors, once for each file, in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from pla_serve.engine.config import Keep
from pla_serve.engine.loading.cache import build_once
from pla_serve.engine.loading.errors import ModelUnavailable, UnsupportedModel
from pla_serve.engine.loading.formats import FORMATS
from pla_serve.engine.loading.progress import LoadingProgress
from pla_serve.engine.loading.tensors import is_quantised, not_kept

FORMAT = 3
"""Part of every cache key. Raise it when the conversion changes: all files are converted again."""


def is_gguf(path: Path) -> bool:
    """Whether a file is a GGUF file by its first bytes."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def kept(path: Path, keep: Keep, progress: LoadingProgress) -> Path | None:
    """Return the folder of a GGUF file whose weights stay in it; None if floats are made of them.

    Raises:
        UnsupportedModel: the file holds something that the conversion would lose; or ``keep`` is
            "keep", and no kernel multiplies its weights as they are.
        ModelUnavailable: the conversion could not be carried out.
    """
    if keep == "none":
        return None
    folder = converted(path, progress, weights=False)
    if unknown := not_kept(folder):
        reason = (
            f"it has weights in {' and '.join(unknown)}, which no kernel multiplies as they are"
        )
    elif not is_quantised(folder):
        reason = "none of its weights are quantised"
    else:
        return folder
    if keep == "keep":
        raise UnsupportedModel(
            f"{path}: {reason} (kept are {', '.join(form.name for form in FORMATS)}). "
            "Drop --quantization keep to make floats of them."
        )
    if unknown:
        progress.say(f"{path.name} is served in floats: {reason}.")
    return None


def converted(path: Path, progress: LoadingProgress, *, weights: bool = True) -> Path:
    """Return the converted folder of a GGUF file; its key is the file's path, size and time.

    Args:
        weights: whether the folder holds the weights as floats. Otherwise it lists where they lie
            in the file.

    Raises:
        UnsupportedModel: the file holds something that the conversion would lose.
        ModelUnavailable: the conversion could not be carried out.
    """
    status = path.stat()
    identity = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    key = cache_key(path.stem, digest) + ("" if weights else "-settings")
    return build_once(
        key, lambda folder: convert(path, folder, progress, weights=weights), progress
    )


def cache_key(stem: str, digest: str) -> str:
    """Return a folder name that people can read."""
    return f"{stem}-{digest}-v{FORMAT}"


def convert(path: Path, folder: Path, progress: LoadingProgress, *, weights: bool = True) -> None:
    """Fill ``folder`` from a GGUF file, in a process of its own.

    The API server calls this. The memory for the weights is free again when that process ends, and
    a crash over a broken file does not end the caller.

    Args:
        weights: see `converted`.

    Raises:
        UnsupportedModel: the file is refused.
        ModelUnavailable: the process crashed, or found no room on the disk or in memory.
    """
    what = f"{path.name} to safetensors" if weights else f"the settings of {path.name}"
    progress.say(f"Converting {what}, once.")
    command = [sys.executable, "-m", "pla_serve.engine.loading.convert", str(path), str(folder)]
    command += [] if weights else ["settings"]
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if progress.bars else subprocess.PIPE,
        env=None if progress.bars else {**os.environ, "TQDM_DISABLE": "1"},
        text=True,
        check=False,
    )
    if result.returncode == 0:
        return
    report = _report(result.stdout)
    if report is not None:
        raise UnsupportedModel(f"{path}: {report}")
    tail = (result.stderr or "").strip().splitlines()[-1:]
    raise ModelUnavailable(
        f"Converting {path} failed (exit status {result.returncode}). {' '.join(tail)} "
        "Is the file complete, and are there disk space and memory for the unpacked weights?"
    )


def _report(stdout: str) -> str | None:
    """Return the reason for which the converter refused the file; None if it crashed."""
    for line in reversed(stdout.splitlines()):
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict) and isinstance(message.get("unsupported"), str):
            return str(message["unsupported"])
    return None
