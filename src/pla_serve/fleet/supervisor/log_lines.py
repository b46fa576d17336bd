"""The logs of all processes as one: each line says whose it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

from pla_serve.logs import LogFormat, printable

LINE_CHARACTERS = 20_000
"""A longer line of plain text is cut. It is far more than an entry of `logs.TextFormatter`."""


def write_line(
    form: LogFormat, write: Callable[[str], object] | None = None
) -> Callable[..., None]:
    """What `Member` calls with a name and a line."""
    put = write or sys.stderr.write
    mark = _as_json if form == "json" else _as_text

    def on_line(name: str, line: str) -> None:
        put(mark(name, line) + "\n")

    return on_line


def _as_text(name: str, line: str) -> str:
    return f"[{name}] {printable(line, LINE_CHARACTERS)}"


def _as_json(name: str, line: str) -> str:
    """The line's own object with the process added; other output becomes a message."""
    entry: dict[str, Any]
    try:
        entry = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"time": now, "level": "info", "message": printable(line)}
    return msgspec.json.encode({**entry, "process": name}).decode()
