"""The user's cache of converted models: built once, by one process, visible only when complete."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pla_serve.engine.loading.errors import ModelUnavailable
from pla_serve.engine.loading.progress import LoadingProgress


def cache_root() -> Path:
    """``PLA_SERVE_CACHE``, else ``pla-serve`` in the cache folder that the platform prescribes."""
    if own := os.environ.get("PLA_SERVE_CACHE"):
        return Path(own).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pla-serve"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "pla-serve"
    return Path.home() / ".cache" / "pla-serve"


def build_once(
    key: str,
    build: Callable[[Path], None],
    progress: LoadingProgress,
    *,
    root: Path | None = None,
    lock_timeout: float = 1800.0,
) -> Path:
    """The folder ``models/<key>``; if it is not there, ``build`` fills an empty folder for it.

    The folder gets its name by one atomic rename after ``build`` returned, under a file lock: a
    build that fails or is killed leaves nothing that a later call would take for a model, and
    processes that ask at once build once.

    Raises:
        ModelUnavailable: the cache cannot be written, or another process holds the lock for longer
            than ``lock_timeout`` seconds.
        Exception: whatever ``build`` raises.
    """
    models = (root or cache_root()) / "models"
    target = models / key
    if target.is_dir():
        return target
    with _writable(models):
        models.mkdir(parents=True, exist_ok=True)
    with _locked(models / f"{key}.lock", progress, lock_timeout):
        if not target.is_dir():
            _build(target, build)
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    """Called under the lock: anything unfinished there is left over from a process that died."""
    unfinished = f".{target.name}."
    for leftover in target.parent.glob(f"{unfinished}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    with _writable(target.parent):
        workspace = Path(tempfile.mkdtemp(prefix=unfinished, dir=target.parent))
    try:
        build(workspace)
        workspace.chmod(0o755)
        workspace.rename(target)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def _locked(path: Path, progress: LoadingProgress, timeout: float) -> Iterator[None]:
    lock = FileLock(path)
    try:
        with _writable(path.parent):
            lock.acquire(timeout=0)
    except Timeout:
        progress.say("Another process is preparing this model; waiting for it.")
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            raise ModelUnavailable(
                f"Another process has held {path} for {timeout:.0f} s. "
                "If none is running any more, delete that file and start again."
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Errors inside mean that the cache cannot be used."""
    try:
        yield
    except Timeout:  # an OSError too, but of the lock
        raise
    except OSError as error:
        raise ModelUnavailable(
            f"The model cache {folder} cannot be written: {error}. "
            "Free some space there, or set PLA_SERVE_CACHE to a folder that can be written."
        ) from error
