"""Reads the lines of input files, and makes requests of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from pla_serve.server.offline.records import BatchLine, LineAnswer, refused_line

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS)
"""Endpoints that lines may name."""
PORTION_LINES = 500
PORTION_BYTES = 4 * 2**20
"""Lines are read in portions: up to so many lines, or a little more than so many bytes."""
MOST_CUSTOM_ID = 512
BESIDE_BODY = 64 * 2**10
"""Bytes of a line beside its body."""


class InputLine(msgspec.Struct):
    """A line of an input file; fields that OpenAI does not name are ignored."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class AnswerMode(msgspec.Struct):
    """Fields of a body that ask for an answer which no file can hold."""

    stream: Any = None
    background: Any = None


@dataclass(slots=True)
class Portion:
    """Lines that were read in one go."""

    lines: list[BatchLine] = field(default_factory=list)
    refused: list[LineAnswer] = field(default_factory=list)


class InputReader:
    """Reads an input file in portions. Its methods run in threads, one at a time.

    Args:
        endpoints: each line has to name one of them.
        most_lines: lines of the file, empty ones included.
        most_bytes: of one line.

    Raises:
        OSError: the file is not there.
    """

    def __init__(
        self, path: Path, endpoints: Collection[str], most_lines: int, most_bytes: int
    ) -> None:
        self._file: BinaryIO = path.open("rb")
        self._endpoints = endpoints
        self._most_lines = most_lines
        self._most_bytes = most_bytes
        self._number = 0
        self._place = 0
        self._seen: set[str] = set()

    def close(self) -> None:
        self._file.close()

    def portion(self) -> Portion | None:
        """Read some more lines; None at the end of the file.

        Raises:
            ValueError: the file has too many lines.
        """
        found, began = Portion(), self._place
        for number, start, text in self._texts():
            if text is None:
                message = f"line {number} is longer than {self._most_bytes} bytes"
                found.refused.append(refused_line(number, None, "line_too_long", message))
            elif text.strip():
                self._sort(found, number, start, text)
            full = len(found.lines) + len(found.refused) >= PORTION_LINES
            if full or self._place - began >= PORTION_BYTES:
                return found
        return found if self._place > began else None

    def _texts(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Yield number, first byte and text of each line; None for the text of one too long."""
        while text := self._file.readline(self._most_bytes + 1):
            self._number += 1
            if self._number > self._most_lines:
                raise ValueError(f"the file has more than {self._most_lines} lines")
            start, self._place = self._place, self._place + len(text)
            if len(text) <= self._most_bytes or text.endswith(b"\n"):
                yield self._number, start, text
                continue
            while text and not text.endswith(b"\n"):
                text = self._file.readline(PORTION_BYTES)
                self._place += len(text)
            yield self._number, start, None

    def _sort(self, found: Portion, number: int, start: int, text: bytes) -> None:
        try:
            line = read_line(text)
            self._check(line)
        except LineError as error:
            message = f"line {number}: {error}"
            found.refused.append(refused_line(number, error.custom_id, "invalid_line", message))
            return
        self._seen.add(line.custom_id)
        found.lines.append(BatchLine(number, start, len(text), line.custom_id))

    def _check(self, line: InputLine) -> None:
        id = line.custom_id
        if not 0 < len(id) <= MOST_CUSTOM_ID:
            raise LineError(f"custom_id must have 1 to {MOST_CUSTOM_ID} characters")
        if id in self._seen:
            raise LineError("another line has the same custom_id", id)
        if line.method != "POST":
            raise LineError("method must be POST", id)
        if line.url not in self._endpoints:
            raise LineError(f"url must be {' or '.join(self._endpoints)}", id)
        if not bytes(line.body).lstrip().startswith(b"{"):
            raise LineError("body must be a JSON object", id)
        try:
            mode = msgspec.json.decode(line.body, type=AnswerMode)
        except (msgspec.DecodeError, RecursionError) as error:
            raise LineError(f"body is not valid JSON: {error}", id) from None
        if mode.stream or mode.background:
            name = "stream" if mode.stream else "background"
            raise LineError(f"leave {name} out of the body: the answer goes to a file", id)


class LineError(Exception):
    """A line cannot be run. ``custom_id`` is the line's own, where it can be read."""

    def __init__(self, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.custom_id = custom_id


def read_line(text: bytes) -> InputLine:
    """Raises:
    LineError: it is no JSON object with custom_id, method, url and body.
    """
    try:
        return msgspec.json.decode(text, type=InputLine)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LineError(str(error)) from None


@dataclass(frozen=True, slots=True)
class LineRequest:
    """The request that a line asks for: what is posted, and where."""

    endpoint: str
    body: bytes


def read_request(path: Path, line: BatchLine) -> LineRequest:
    """Return the request that a line of the file at ``path`` asks for.

    Raises:
        OSError: the file cannot be read.
        LineError: it is not the file that it was.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        text = os.pread(descriptor, line.size, line.start)
    finally:
        os.close(descriptor)
    found = read_line(text)
    body = bytes(found.body)
    if found.url == RESPONSES:
        # Nobody asks for such an answer by its id, and kept ones would drive out those of others.
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        body = msgspec.json.encode({**fields, "store": False})
    return LineRequest(found.url, body)
