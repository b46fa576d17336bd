"""The user's cache of converted models: each is built once and visible only when complete."""

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
    """Return ``PLA_SERVE_CACHE`` if it is set, or ``pla-serve`` in the platform's cache folder."""
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
    """Return the folder ``models/<key>``, after ``build`` has filled it if it did not exist.

    ``build`` gets an empty folder. Once it has returned, the folder is renamed atomically under a
    file lock. So a build that fails or is killed leaves nothing that looks like a model, and
    several processes that need the same model build it once.

    Args:
        root: folder of the cache; None for `cache_root`.
        lock_timeout: seconds to wait for another process that builds the same model.

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
    """Build under the lock; unfinished folders there were left by processes that died."""
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
    """Turn file errors inside into ModelUnavailable, with what to do."""
    try:
        yield
    except Timeout:  # filelock's error is an OSError as well
        raise
    except OSError as error:
        raise ModelUnavailable(
            f"The model cache {folder} cannot be written: {error}. "
            "Free some space there, or set PLA_SERVE_CACHE to a folder that can be written."
        ) from error
