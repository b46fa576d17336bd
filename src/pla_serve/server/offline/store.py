"""The folder of offline batches: a database, the contents of files, and a lock.

A file is written under another name, made durable, renamed, and only then entered in the database.
So every file in the database is whole, and what is not in it is left over and removed at start.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from filelock import FileLock, Timeout

from pla_serve.server.errors import ApiError
from pla_serve.server.offline.database import Database
from pla_serve.server.offline.records import StoredFile, new_file_id
from pla_serve.server.offline_options import OfflineOptions

Result = TypeVar("Result")

UNFINISHED = ".part"
"""Ending of a file that is being written."""
WRITERS = 4
"""Threads that parse uploads and write files."""


class FolderError(Exception):
    """The folder of offline batches cannot be used; the message names the cure."""


class OfflineStore:
    """The folder that ``options`` names. Belongs to one event loop and one process.

    Args:
        clock: Unix seconds.
        free_bytes: bytes that are free on the disk of a folder.

    Raises:
        FolderError: another server uses the folder, or it cannot be written.
    """

    def __init__(
        self,
        options: OfflineOptions,
        *,
        clock: Callable[[], float] = time.time,
        free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
    ) -> None:
        assert options.batch_dir is not None
        self.options = options
        self._folder = options.batch_dir
        self._files = self._folder / "files"
        self._clock = clock
        self._free_bytes = free_bytes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="offline-database")
        self.writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="offline-files")
        self._lock = FileLock(self._folder / "lock", thread_local=False)
        try:
            self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._database = self._thread.submit(self._open).result()
        except Timeout:
            raise FolderError(
                f"another server uses {self._folder}; stop it, or name another folder with "
                "--batch-dir"
            ) from None
        except (OSError, sqlite3.Error, ValueError) as error:
            if self._lock.is_locked:
                self._lock.release()
            raise FolderError(
                f"cannot use {self._folder} for offline batches: {error}. Name a folder that can "
                "be written with --batch-dir."
            ) from None

    def now(self) -> int:
        """Return the time in Unix seconds."""
        return int(self._clock())

    async def run(self, work: Callable[[Database], Result]) -> Result:
        """Return ``work(database)``, computed in the database's own thread.

        Raises:
            ApiError: as ``work`` raises it.
            sqlite3.Error: the disk is full, or the database is damaged.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: work(self._database))

    async def write(self, work: Callable[[], Result]) -> Result:
        """Return ``work()``, computed in a thread for files."""
        return await asyncio.get_running_loop().run_in_executor(self.writers, work)

    def has_space(self, more: int = 0) -> bool:
        """Whether ``more`` bytes leave the disk with what has to stay free."""
        try:
            return self._free_bytes(self._folder) - more >= self.options.free_bytes
        except OSError:
            return False

    def check_space(self, more: int = 0) -> None:
        """Raises:
        ApiError: 507, the disk has too little space for ``more`` bytes.
        """
        if not self.has_space(more):
            raise disk_full()

    def path(self, id: str) -> Path:
        """Return where the content of a file is; ``id`` is one that the database knows."""
        return self._files / id

    def begin_file(self) -> NewFile:
        """Return a new, empty file. To be called in a thread."""
        return NewFile(self._files, new_file_id())

    def remove(self, id: str) -> None:
        """Remove the content of a file that the database has forgotten. To be called in a thread"""
        self.path(id).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the folder, once what was begun is done."""
        self.writers.shutdown()
        self._thread.submit(self._database.close)
        self._thread.shutdown()
        self._lock.release()

    def _open(self) -> Database:
        database = Database(self._folder / "batches.sqlite", self.options.max_key_bytes)
        known = database.file_ids()
        for path in self._files.iterdir():
            if path.name not in known:
                path.unlink()
        return database


class NewFile:
    """A file that is being written. It is there for others once `keep` has returned."""

    def __init__(self, folder: Path, id: str) -> None:
        self.id = id
        self.size = 0
        """Bytes written."""
        self._folder = folder
        self._path = folder / f"{id}{UNFINISHED}"
        self._file: BinaryIO | None = self._path.open("xb")

    def write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self.size += len(data)

    def keep(self) -> None:
        """Make the content durable under its own name."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._path.rename(self._folder / self.id)
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def discard(self) -> None:
        """Remove the content, kept or not."""
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses what was buffered
                self._file.close()
            self._file = None
        self._path.unlink(missing_ok=True)
        (self._folder / self.id).unlink(missing_ok=True)

    def record(self, owner: str, purpose: str, name: str, now: int) -> StoredFile:
        """Return the file as the database keeps it."""
        return StoredFile(0, self.id, owner, purpose, name, self.size, now)


def disk_full() -> ApiError:
    """Return the error for what does not fit on the disk."""
    return ApiError(
        507,
        "the server's disk has too little space; try later, or ask its operator",
        type="server_error",
        code="insufficient_storage",
    )
