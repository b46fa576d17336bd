"""Merges the logs of all processes; each line names its process."""

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
    """Make the function that writes a line of a process.

    Args:
        form: form of the logs.
        write: writes text; None: to standard error.

    Returns:
        A function of the process's name and a line of its log.
    """
    put = write or sys.stderr.write
    mark = _as_json if form == "json" else _as_text

    def on_line(name: str, line: str) -> None:
        put(mark(name, line) + "\n")

    return on_line


def _as_text(name: str, line: str) -> str:
    return f"[{name}] {printable(line, LINE_CHARACTERS)}"


def _as_json(name: str, line: str) -> str:
    """Add the process to the JSON object of a line; a line of other output becomes a message."""
    entry: dict[str, Any]
    try:
        entry = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {"time": now, "level": "info", "message": printable(line)}
    return msgspec.json.encode({**entry, "process": name}).decode()
