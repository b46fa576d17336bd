"""What a parent process and the child that it starts share: a folder, a first line, one life."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import msgspec


def private_folder() -> Path:
    """A new folder of mode 0700 whose path fits into a Unix socket address (107 bytes)."""
    folder = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="pla-serve-", dir=folder if len(folder) < 70 else "/tmp"))


def tell(child: subprocess.Popen[bytes], launch: msgspec.Struct) -> None:
    """Write ``launch`` to the child's standard input, as one line of JSON.

    A child that has died already is seen by who watches it.
    """
    assert child.stdin is not None
    with suppress(BrokenPipeError):
        child.stdin.write(msgspec.json.encode(launch) + b"\n")
        child.stdin.flush()


def await_end_of_parent() -> None:
    """Blocks until the parent is gone: its end of this process's standard input closes with it."""
    with suppress(OSError):
        while os.read(sys.stdin.fileno(), 4096):
            pass
