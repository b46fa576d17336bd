"""Describes where a recorded result comes from, without naming a person or a machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

_SECRET = ("--api-key",)
_PACKAGES = ("torch", "transformers", "numpy")


def describe(command: Sequence[str] | None = None) -> dict[str, object]:
    """Return the machine, the date, the versions and the command line, JSON-ready.

    Args:
        command: words of the command to record; None takes those of this process. Folders and API
            keys in it are cut off, so that a result can be published.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(sys.argv if command is None else command),
        "machine": {
            "cpu": cpu_model(),
            "cores": usable_cores(),
            "memory_gib": _memory_gib(),
            "os": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "accelerator": _accelerator(),
        },
        "versions": {
            "pla_serve": _version("pla-serve"),
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
            "git": _git_commit(),
        },
    }


def _command(argv: Sequence[str]) -> str:
    """Return the words without folders and API keys, as one line."""
    words: list[str] = []
    for word in argv:
        flag, equals, _ = word.partition("=")
        if words and words[-1] in _SECRET:
            word = "***"
        elif flag in _SECRET and equals:
            word = f"{flag}=***"
        words.append(_without_folder(word))
    return shlex.join(words)


def _without_folder(word: str) -> str:
    """Return ``--option=c`` for ``--option=/a/b/c``; URLs and relative paths stay as they are."""
    head, equals, tail = word.rpartition("=")
    return f"{head}{equals}{Path(tail).name}" if tail.startswith(("/", "~")) else word


def cpu_model() -> str:
    """Return the name of the processor, or ``unknown``."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or "unknown"


def usable_cores() -> int:
    """Return the number of CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(float(size) / 2**30, 1)


def _accelerator() -> str | None:
    """Return the name of the first CUDA device, if torch is loaded already and has one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name(0))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the checkout that this file is in, with ``+`` if it has changes."""
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    if not commit or _git(folder, "ls-files", "--error-unmatch", __file__) is None:
        return None
    return commit + ("+" if _git(folder, "status", "--porcelain", "-uno") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
