"""Files, batches, lines and answers in SQLite.

One thread uses it (`OfflineStore`). Each method that changes something is one transaction, and with
``synchronous=FULL`` it is on disk when the method returns.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from pla_serve.server.errors import ApiError, invalid
from pla_serve.server.offline.records import (
    LIVE,
    BatchLine,
    BatchStatus,
    LineAnswer,
    OfflineBatch,
    StoredFile,
)

VERSION = 1
"""Version of the tables; a folder of another version is refused."""
TABLES = """
CREATE TABLE files (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    purpose TEXT NOT NULL, name TEXT NOT NULL, size INTEGER NOT NULL, created INTEGER NOT NULL
);
CREATE INDEX files_of_owner ON files (owner, place);
CREATE TABLE batches (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    status TEXT NOT NULL, endpoint TEXT NOT NULL, input_file TEXT NOT NULL, window TEXT NOT NULL,
    metadata TEXT, created INTEGER NOT NULL, expires INTEGER NOT NULL, times TEXT NOT NULL,
    errors TEXT, output_file TEXT, error_file TEXT, total INTEGER NOT NULL DEFAULT 0,
    done INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX batches_of_owner ON batches (owner, place);
CREATE INDEX batches_by_status ON batches (status, place);
CREATE TABLE lines (
    batch INTEGER NOT NULL, number INTEGER NOT NULL, start INTEGER NOT NULL, size INTEGER NOT NULL,
    custom_id TEXT, attempts INTEGER NOT NULL DEFAULT 0, answered INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch, number)
) WITHOUT ROWID;
CREATE INDEX lines_waiting ON lines (batch, number) WHERE answered = 0;
CREATE TABLE answers (
    batch INTEGER NOT NULL, number INTEGER NOT NULL, good INTEGER NOT NULL, text BLOB NOT NULL,
    PRIMARY KEY (batch, number)
);
"""
MOST_FILES = 10_000
MOST_LIVE_BATCHES = 100
"""Files and unfinished batches of one owner."""
FILE_COLUMNS = "place, id, owner, purpose, name, size, created"
BATCH_COLUMNS = (
    "place, id, owner, status, endpoint, input_file, window, metadata, created, expires, times, "
    "errors, output_file, error_file, total, done, failed"
)
_LIVE = ", ".join(f"'{status}'" for status in LIVE)


class Database:
    """One SQLite file.

    Args:
        path: made if it is not there.
        max_key_bytes: most bytes of the files of one owner.

    Raises:
        sqlite3.Error: it cannot be opened.
        ValueError: it is of another version of this program.
    """

    def __init__(self, path: Path, max_key_bytes: int) -> None:
        self._max_key_bytes = max_key_bytes
        self._connection = sqlite3.connect(path, isolation_level=None)
        run = self._connection.execute
        run("PRAGMA auto_vacuum = FULL")
        run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = FULL")
        (version,) = run("PRAGMA user_version").fetchone()
        if version == 0:
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;"
            )
        elif version != VERSION:
            self._connection.close()
            raise ValueError(
                f"{path} was written by another version of pla-serve ({version}, this one has "
                f"{VERSION}); name another folder with --batch-dir"
            )

    def close(self) -> None:
        self._connection.close()

    # Files

    def add_file(self, file: StoredFile, *, bounded: bool = True) -> None:
        """Keep a file whose content is on disk; its ``place`` is chosen here.

        Args:
            bounded: whether the owner's quota holds for it.

        Raises:
            ApiError: 413, the owner would have more than one may have.
        """
        with self._transaction():
            if bounded:
                self.check_quota(file.owner, file.size)
            self._insert_file(file)

    def check_quota(self, owner: str, more: int) -> None:
        """Raises:
        ApiError: 413, the owner's files and ``more`` bytes are more than one may have.
        """
        query = "SELECT count(*), coalesce(sum(size), 0) FROM files WHERE owner = ?"
        count, used = self._connection.execute(query, (owner,)).fetchone()
        if count >= MOST_FILES or used + more > self._max_key_bytes:
            raise ApiError(
                413,
                f"your files take {used} bytes in {count} files; at most {self._max_key_bytes} "
                f"bytes in {MOST_FILES} files are kept: delete some",
                code="storage_limit_exceeded",
            )

    def file(self, owner: str, id: str) -> StoredFile | None:
        query = f"SELECT {FILE_COLUMNS} FROM files WHERE id = ? AND owner = ?"
        row = self._connection.execute(query, (id, owner)).fetchone()
        return None if row is None else StoredFile(*row)

    def files(
        self, owner: str, *, purpose: str | None, after: str | None, most: int, newest_first: bool
    ) -> list[StoredFile]:
        """Return up to ``most`` files of the owner that come after the file ``after``.

        Raises:
            ApiError: 400, the owner has no file ``after``.
        """
        place = self._cursor("files", owner, after)
        order, sign = ("DESC", "<") if newest_first else ("ASC", ">")
        query = f"SELECT {FILE_COLUMNS} FROM files WHERE owner = ?"
        values: list[Any] = [owner]
        if purpose is not None:
            query, values = f"{query} AND purpose = ?", [*values, purpose]
        if place is not None:
            query, values = f"{query} AND place {sign} ?", [*values, place]
        rows = self._connection.execute(f"{query} ORDER BY place {order} LIMIT ?", [*values, most])
        return [StoredFile(*row) for row in rows]

    def file_ids(self) -> set[str]:
        """Return the ids of all files."""
        return {id for (id,) in self._connection.execute("SELECT id FROM files")}

    def delete_file(self, owner: str, id: str) -> bool:
        """Forget a file; False if the owner has no such file.

        Raises:
            ApiError: 409, a batch that is not over reads it.
        """
        with self._transaction():
            query = f"SELECT id FROM batches WHERE input_file = ? AND status IN ({_LIVE})"
            reader = self._connection.execute(query, (id,)).fetchone()
            if reader is not None and self.file(owner, id) is not None:
                raise ApiError(
                    409,
                    f"{reader[0]} still reads this file: wait until it is over, or cancel it",
                    code="file_in_use",
                )
            query = "DELETE FROM files WHERE id = ? AND owner = ?"
            return self._connection.execute(query, (id, owner)).rowcount == 1

    # Batches

    def add_batch(self, batch: OfflineBatch) -> None:
        """Keep a new batch; its ``place`` is chosen here.

        Raises:
            ApiError: 404, the owner has no such input file; 413, the owner's files take all that
                they may; 429, the owner has too many batches that are not over.
        """
        with self._transaction():
            if self.file(batch.owner, batch.input_file) is None:
                raise no_such_file(batch.input_file, "input_file_id")
            self.check_quota(batch.owner, 0)
            query = f"SELECT count(*) FROM batches WHERE owner = ? AND status IN ({_LIVE})"
            (count,) = self._connection.execute(query, (batch.owner,)).fetchone()
            if count >= MOST_LIVE_BATCHES:
                raise ApiError(
                    429,
                    f"{count} batches of yours are not over; wait for one, or cancel one",
                    type="rate_limit_exceeded",
                    code="too_many_batches",
                    retry_after=60.0,
                )
            names = BATCH_COLUMNS.removeprefix("place, ")
            marks = ", ".join("?" * len(names.split(",")))
            self._connection.execute(
                f"INSERT INTO batches ({names}) VALUES ({marks})", _batch_values(batch)
            )

    def batch(self, owner: str, id: str) -> OfflineBatch | None:
        query = f"SELECT {BATCH_COLUMNS} FROM batches WHERE id = ? AND owner = ?"
        row = self._connection.execute(query, (id, owner)).fetchone()
        return None if row is None else _batch(row)

    def batches(self, owner: str, *, after: str | None, most: int) -> list[OfflineBatch]:
        """Return up to ``most`` batches of the owner, newest first, after the batch ``after``.

        Raises:
            ApiError: 400, the owner has no batch ``after``.
        """
        place = self._cursor("batches", owner, after)
        query = f"SELECT {BATCH_COLUMNS} FROM batches WHERE owner = ? AND (? IS NULL OR place < ?)"
        rows = self._connection.execute(
            f"{query} ORDER BY place DESC LIMIT ?", (owner, place, place, most)
        )
        return [_batch(row) for row in rows]

    def live_batches(self) -> list[OfflineBatch]:
        """Return the batches that are not over, of all owners, oldest first."""
        query = f"SELECT {BATCH_COLUMNS} FROM batches WHERE status IN ({_LIVE}) ORDER BY place"
        return [_batch(row) for row in self._connection.execute(query)]

    def change_status(
        self,
        batch: OfflineBatch,
        status: BatchStatus,
        now: int,
        *,
        only_from: Sequence[BatchStatus],
        errors: list[dict[str, Any]] | None = None,
    ) -> bool:
        """Move a batch to another state; False if it was in none of the states ``only_from``."""
        with self._transaction():
            return self._change_status(batch, status, now, only_from, errors)

    def finish(
        self,
        batch: OfflineBatch,
        status: BatchStatus,
        now: int,
        output: StoredFile | None,
        errors: StoredFile | None,
    ) -> None:
        """End a batch whose output files are on disk, and forget its lines and answers."""
        with self._transaction():
            for column, file in (("output_file", output), ("error_file", errors)):
                if file is not None:
                    self._insert_file(file)
                    query = f"UPDATE batches SET {column} = ? WHERE place = ?"
                    self._connection.execute(query, (file.id, batch.place))
            if status == "expired":
                query = "UPDATE batches SET failed = total - done WHERE place = ?"
                self._connection.execute(query, (batch.place,))
            self._change_status(batch, status, now, LIVE, None)
            self._forget_lines(batch)

    # Lines

    def forget_lines(self, batch: OfflineBatch) -> None:
        """Forget what an interrupted reading of the input file has left."""
        with self._transaction():
            self._forget_lines(batch)
            query = "UPDATE batches SET total = 0, done = 0, failed = 0 WHERE place = ?"
            self._connection.execute(query, (batch.place,))

    def add_lines(
        self, batch: OfflineBatch, lines: Sequence[BatchLine], refused: Sequence[LineAnswer]
    ) -> None:
        """Keep lines of a batch, and the answers to lines that cannot be run."""
        with self._transaction():
            self._connection.executemany(
                "INSERT INTO lines (batch, number, start, size, custom_id) VALUES (?, ?, ?, ?, ?)",
                [(batch.place, e.number, e.start, e.size, e.custom_id) for e in lines],
            )
            self._connection.executemany(
                "INSERT INTO answers (batch, number, good, text) VALUES (?, ?, ?, ?)",
                [(batch.place, each.number, each.good, each.text) for each in refused],
            )
            query = "UPDATE batches SET total = total + ?, failed = failed + ? WHERE place = ?"
            total = len(lines) + len(refused)
            self._connection.execute(query, (total, len(refused), batch.place))

    def waiting_lines(self, batch: OfflineBatch, after: int, most: int) -> list[BatchLine]:
        """Return up to ``most`` lines without an answer whose number is above ``after``."""
        query = (
            "SELECT number, start, size, custom_id, attempts FROM lines "
            "WHERE batch = ? AND answered = 0 AND number > ? ORDER BY number LIMIT ?"
        )
        rows = self._connection.execute(query, (batch.place, after, most))
        return [BatchLine(*row) for row in rows]

    def answer(self, batch: OfflineBatch, answer: LineAnswer) -> bool:
        """Keep the answer to a line; False if it has one already, or if the batch is over."""
        column = "done" if answer.good else "failed"
        with self._transaction():
            query = "UPDATE lines SET answered = 1 WHERE batch = ? AND number = ? AND answered = 0"
            if self._connection.execute(query, (batch.place, answer.number)).rowcount == 0:
                return False
            query = "INSERT INTO answers (batch, number, good, text) VALUES (?, ?, ?, ?)"
            self._connection.execute(query, (batch.place, answer.number, answer.good, answer.text))
            query = f"UPDATE batches SET {column} = {column} + 1 WHERE place = ?"
            self._connection.execute(query, (batch.place,))
            return True

    def count_attempt(self, batch: OfflineBatch, number: int) -> None:
        """Note that a line failed by a fault of ours."""
        with self._transaction():
            query = "UPDATE lines SET attempts = attempts + 1 WHERE batch = ? AND number = ?"
            self._connection.execute(query, (batch.place, number))

    def answers(
        self, batch: OfflineBatch, *, good: bool, after: int, most: int
    ) -> list[LineAnswer]:
        """Return up to ``most`` answers of one kind to lines above ``after``, in their order."""
        query = (
            "SELECT number, good, text FROM answers "
            "WHERE batch = ? AND number > ? AND good = ? ORDER BY number LIMIT ?"
        )
        rows = self._connection.execute(query, (batch.place, after, good, most))
        return [LineAnswer(number, bool(kind), text) for number, kind, text in rows]

    # Parts of transactions

    def _insert_file(self, file: StoredFile) -> None:
        names = FILE_COLUMNS.removeprefix("place, ")
        self._connection.execute(
            f"INSERT INTO files ({names}) VALUES (?, ?, ?, ?, ?, ?)",
            (file.id, file.owner, file.purpose, file.name, file.size, file.created),
        )

    def _change_status(
        self,
        batch: OfflineBatch,
        status: BatchStatus,
        now: int,
        only_from: Sequence[BatchStatus],
        errors: list[dict[str, Any]] | None,
    ) -> bool:
        marks = ", ".join("?" * len(only_from))
        query = (
            "UPDATE batches SET status = ?, times = json_set(times, ?, ?), "
            f"errors = coalesce(?, errors) WHERE place = ? AND status IN ({marks})"
        )
        faults = None if errors is None else msgspec.json.encode(errors).decode()
        values = (status, f"$.{status}_at", now, faults, batch.place, *only_from)
        return self._connection.execute(query, values).rowcount == 1

    def _forget_lines(self, batch: OfflineBatch) -> None:
        for table in ("lines", "answers"):
            self._connection.execute(f"DELETE FROM {table} WHERE batch = ?", (batch.place,))

    def _cursor(self, table: str, owner: str, after: str | None) -> int | None:
        if after is None:
            return None
        query = f"SELECT place FROM {table} WHERE id = ? AND owner = ?"
        row = self._connection.execute(query, (after, owner)).fetchone()
        if row is None:
            raise invalid(f"after names nothing of yours: {after[:100]!r}", "after")
        place: int = row[0]
        return place

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # SQLite ends it by itself when the disk is full
                self._connection.execute("ROLLBACK")
            raise


def no_such_file(id: str, param: str | None = None) -> ApiError:
    """Return the error for a file that the owner does not have, whoever else has it."""
    return ApiError(404, f"No such File object: {id[:100]}", param=param or "id")


def _batch_values(batch: OfflineBatch) -> list[Any]:
    """Return the columns of a batch after its place."""

    def text(value: Any) -> str | None:
        return None if value is None else msgspec.json.encode(value).decode()

    return [
        *(batch.id, batch.owner, batch.status, batch.endpoint, batch.input_file, batch.window),
        *(text(batch.metadata), batch.created, batch.expires, text(batch.times)),
        *(text(batch.errors), batch.output_file, batch.error_file),
        *(batch.total, batch.done, batch.failed),
    ]


def _batch(row: Sequence[Any]) -> OfflineBatch:
    values = list(row)
    for column in (7, 10, 11):  # metadata, times, errors
        if values[column] is not None:
            values[column] = msgspec.json.decode(values[column])
    return OfflineBatch(*values)
