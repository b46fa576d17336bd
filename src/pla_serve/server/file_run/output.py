"""The output file: it says which lines have their answer, so that a run can be started again."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from pla_serve.server.offline.records import LineAnswer

PREFIX = b'{"id":"batch_req_'
"""How each line begins."""
ID = re.compile(r"batch_req_([1-9][0-9]{0,17})")
SYNC_SECONDS = 1.0
"""Answers reach the disk at least this often. What a loss of power takes is asked again."""


class OutputError(Exception):
    """The output file cannot be used; the message names the cause and the cure."""


class AnsweredLine(msgspec.Struct):
    """What an output file says of one line of the input."""

    id: str
    custom_id: str | None


class OutputFile:
    """Appends answers, one line each, and knows those of earlier runs. For one thread at a time.

    The ``id`` of an answer has the number of its line, ``batch_req_12``. A line that was cut off
    by the end of a process is dropped. The file is locked until `close`.

    Raises:
        OutputError: the file holds something else, or another run uses it.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.answered: dict[int, str | None] = {}
        """Numbers of the lines that have an answer, with their ``custom_id``."""
        try:
            if not stat.S_ISREG(os.fstat(self._file).st_mode):
                raise OutputError(f"{path} is no regular file, so a run could not be resumed")
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise
        self._synced = clock()

    def check(self, asked: Mapping[int, str | None]) -> None:
        """Check that all answers are those of an input with these lines.

        Args:
            asked: ``custom_id`` of each line by its number.

        Raises:
            OutputError: an answer belongs to another input.
        """
        for number, custom_id in self.answered.items():
            if number not in asked or asked[number] != custom_id:
                raise OutputError(
                    f"{self._path} has an answer to line {number}, custom_id {custom_id!r}, which "
                    "the input does not have there. Name another output, or give the input that "
                    "it was begun with."
                )

    def add(self, answer: LineAnswer) -> bool:
        """Append the answer to a line; False, and nothing is done, if the line has one.

        Raises:
            OSError: the disk is full. What was written of the line is dropped by the next run.
        """
        if answer.number in self.answered:
            return False
        fields = msgspec.json.decode(answer.text, type=dict[str, msgspec.Raw])
        fields["id"] = msgspec.Raw(msgspec.json.encode(f"batch_req_{answer.number}"))
        text = memoryview(msgspec.json.encode(fields) + b"\n")
        while text:
            text = text[os.write(self._file, text) :]
        self.answered[answer.number] = msgspec.json.decode(fields["custom_id"], type=str | None)
        if self._clock() - self._synced >= SYNC_SECONDS:
            self.sync()
        return True

    def sync(self) -> None:
        """Make durable what was written.

        Raises:
            OSError: the disk is full or broken.
        """
        os.fsync(self._file)
        self._synced = self._clock()

    def close(self) -> None:
        os.close(self._file)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"another run writes {self._path}; wait for it or stop it") from None

    def _read(self) -> None:
        """Learn what is answered, and drop a torn last line."""
        number = end = 0
        with open(self._file, "rb", closefd=False) as lines:
            for number, text in enumerate(lines, 1):
                if not text.endswith(b"\n"):
                    if not (text.startswith(PREFIX) or PREFIX.startswith(text)):
                        raise self._foreign(number)
                    os.ftruncate(self._file, end)
                    break
                end += len(text)
                self._learn(number, text)

    def _learn(self, place: int, text: bytes) -> None:
        try:
            line = msgspec.json.decode(text, type=AnsweredLine)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self._foreign(place) from None
        found = ID.fullmatch(line.id)
        if found is None:
            raise self._foreign(place)
        if (number := int(found[1])) in self.answered:
            raise OutputError(f"{self._path} has two answers to line {number}; remove one")
        self.answered[number] = line.custom_id

    def _foreign(self, place: int) -> OutputError:
        return OutputError(
            f"line {place} of {self._path} is no answer that pla-serve batch wrote; name another "
            "output, or remove the file"
        )
