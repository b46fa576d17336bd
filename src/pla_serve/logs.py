"""Logs as text for people or as JSON for machines, with the id of the request that they are of."""

from __future__ import annotations

import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import IO, Any, Literal

import msgspec

LogFormat = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that the running task serves."""

ROOT = "pla_serve."
REQUESTS = "pla_serve.requests"
"""The logger with an entry for each request; in text only at level debug."""
_PLAIN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "request_id"}


def configure(level: str, form: LogFormat, process: str, stream: IO[str] | None = None) -> None:
    """Send all logs to ``stream``, standard error by default.

    Args:
        process: what writes them: ``server``, ``router``, ``fleet``, or a name of an instance.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process) if form == "json" else TextFormatter(process))
    if form == "text" and level.lower() != "debug":
        handler.addFilter(lambda record: record.name != REQUESTS)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for chatty in ("uvicorn", "httpx", "httpcore", "websockets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def in_use() -> tuple[str, LogFormat]:
    """Level and form of this process's logs, for a process that it starts."""
    root = logging.getLogger()
    machines = any(isinstance(handler.formatter, JsonFormatter) for handler in root.handlers)
    return logging.getLevelName(root.level), "json" if machines else "text"


class TextFormatter(logging.Formatter):
    """One line for a person."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        id = getattr(record, "request_id", None) or request_id.get()
        return line if id is None else f"{line} (request {id})"


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
            "message": record.getMessage(),
        }
        id = getattr(record, "request_id", None) or request_id.get()
        if id is not None:
            entry["request_id"] = id
        entry |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry, enc_hook=str).decode()
