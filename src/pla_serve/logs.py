"""Logs as text for people or as JSON for machines, with the id of the request in question."""

from __future__ import annotations

import logging
import re
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import IO, Any, Literal

import msgspec

LogFormat = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the request that the running task serves."""

ROOT = "pla_serve."
REQUESTS = "pla_serve.requests"
"""Logger with an entry for each request; text logs show them only at level debug."""
MOST_CHARACTERS = 4000
"""A longer message or field is cut: a client's text may be as long as a request's body."""
MOST_LINES = 200
"""Most characters of a traceback."""
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters, line ends, marks that change the direction of text, halves of surrogates."""
_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "request_id"}


def configure(level: str, form: LogFormat, process: str, stream: IO[str] | None = None) -> None:
    """Send all logs to ``stream``, standard error by default.

    Args:
        level: least serious level that is logged.
        form: text or json.
        process: name of this process in the logs: ``server``, ``router`` or ``fleet``.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process))
    if form == "text" and level.lower() != "debug":
        handler.addFilter(lambda record: record.name != REQUESTS)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for chatty in ("uvicorn", "httpx", "httpcore", "websockets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Its warnings are about requests that cannot be read: anybody could fill the log with them.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def in_use() -> tuple[str, LogFormat]:
    """Return level and form of this process's logs, to start another process with the same."""
    root = logging.getLogger()
    machines = any(isinstance(handler.formatter, JsonFormatter) for handler in root.handlers)
    return logging.getLevelName(root.level), "json" if machines else "text"


def printable(text: str, most: int = MOST_CHARACTERS) -> str:
    """``text`` on one line: what a terminal or a reader of logs would obey is escaped.

    A text of more than ``most`` characters is cut, and ends with its length.
    """
    cut = text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), cut)


class TextFormatter(logging.Formatter):
    """One line for a person; lines of a traceback are indented, so that none looks like an entry.

    Texts of clients cannot add lines: see `printable`.
    """

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        id = getattr(record, "request_id", None) or request_id.get()
        line = printable(super().formatMessage(record))
        return line if id is None else f"{line} (request {printable(str(id))})"

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return _indented(super().formatException(ei))


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, process, logger, message, the request's id where there
    is one, and whatever came as ``extra``."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name.removeprefix(ROOT),
            "message": printable(record.getMessage()),
        }
        id = getattr(record, "request_id", None) or request_id.get()
        if id is not None:
            entry["request_id"] = printable(str(id))
        entry |= {
            name: printable(value) if isinstance(value, str) else value
            for name, value in vars(record).items()
            if name not in _PLAIN
        }
        if record.exc_info:
            entry["error"] = _indented(self.formatException(record.exc_info))
        return msgspec.json.encode(entry, enc_hook=str).decode()


def _indented(traceback: str) -> str:
    """A traceback with the text of each line `printable`; cut in the middle if it is long."""
    lines = traceback.splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES // 2], "…", *lines[-MOST_LINES // 2 :]]
    return "\n".join("  " + printable(line) for line in lines)
