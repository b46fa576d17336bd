"""Helpers of a parent process and its child: a private folder, a first line, a common end."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec

PREFIX = "pla-serve-"
LOCK = "lock"
"""File in a private folder that its owner holds locked for as long as it lives."""


class PrivateFolder:
    """A new folder of mode 0700 whose path fits into a Unix socket address (107 bytes).

    Folders of processes that were killed are removed whenever a new one is made.

    Args:
        parent: where it is made; None takes the system's folder for temporary files.
    """

    def __init__(self, parent: Path | None = None) -> None:
        where = parent or Path(tempfile.gettempdir())
        if len(str(where)) >= 70:
            where = Path("/tmp")
        remove_leftovers(where)
        new = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=where))
        self._lock = os.open(new / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # It gets its name only now, so that nobody finds it without an owner.
        self.path = new.rename(where / new.name[1:])

    def remove(self) -> None:
        """Remove the folder and all in it; the second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_leftovers(parent: Path) -> None:
    """Remove this user's private folders in ``parent`` whose owners are dead."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            about = folder.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def tell(child: subprocess.Popen[bytes], launch: msgspec.Struct) -> None:
    """Write ``launch`` to the child's standard input, as one line of JSON.

    If the child has died already, nothing happens here. Its parent watches it elsewhere.
    """
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.write(msgspec.json.encode(launch) + b"\n")
        child.stdin.flush()


def await_end_of_parent() -> None:
    """Block until the parent is gone, which closes this process's standard input."""
    with suppress(OSError):
        while os.read(sys.stdin.fileno(), 4096):
            pass
