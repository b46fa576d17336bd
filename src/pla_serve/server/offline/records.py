"""Files and batches as they are kept, and as OpenAI's API shows them."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
LIVE: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")
"""States of a batch that is not over."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of an owner.

    Attributes:
        place: order of creation among all files.
        owner: as `Owners` names it.
        name: of the client's own file; it is shown and never used as a path.
        size: bytes.
        created: Unix seconds.
    """

    place: int
    id: str
    owner: str
    purpose: str
    name: str
    size: int
    created: int

    def card(self) -> dict[str, Any]:
        """Return the file as OpenAI's API shows it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass(frozen=True, slots=True)
class OfflineBatch:
    """One batch of an owner.

    Attributes:
        place: order of creation among all batches.
        window: the completion window as the client gave it.
        created: Unix seconds; so are ``expires`` and the values of ``times``.
        times: when each state began, as ``in_progress_at``.
        errors: faults of the whole input file.
        total: lines of the input file.
        done: lines answered with a status below 300.
        failed: lines answered with an error.
    """

    place: int
    id: str
    owner: str
    status: BatchStatus
    endpoint: str
    input_file: str
    window: str
    metadata: dict[str, str] | None
    created: int
    expires: int
    times: dict[str, int] = field(default_factory=dict)
    errors: list[dict[str, Any]] | None = None
    output_file: str | None = None
    error_file: str | None = None
    total: int = 0
    done: int = 0
    failed: int = 0

    @property
    def answered(self) -> bool:
        """Whether every line has its answer."""
        return self.done + self.failed >= self.total

    def card(self) -> dict[str, Any]:
        """Return the batch as OpenAI's API shows it."""
        moments = ("in_progress", "finalizing", "completed", "failed", "expired")
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": None if self.errors is None else {"object": "list", "data": self.errors},
            "input_file_id": self.input_file,
            "completion_window": self.window,
            "status": self.status,
            "output_file_id": self.output_file,
            "error_file_id": self.error_file,
            "created_at": self.created,
            "expires_at": self.expires,
            **{
                f"{name}_at": self.times.get(f"{name}_at")
                for name in (*moments, "cancelling", "cancelled")
            },
            "request_counts": {
                "total": self.total,
                "completed": self.done,
                "failed": self.failed,
            },
            "metadata": self.metadata,
        }


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of an input file that has no answer yet.

    Attributes:
        number: from 1, as editors count.
        start: its first byte in the file.
        size: bytes.
        attempts: times that it failed by a fault of ours.
    """

    number: int
    start: int
    size: int
    custom_id: str
    attempts: int = 0


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """Answer to one line, as one line of the output or error file without its line end."""

    number: int
    good: bool
    text: bytes


def new_file_id() -> str:
    """Return the id of a new file. It is a plain name on disk too."""
    return f"file-{uuid.uuid4().hex}"


def new_batch_id() -> str:
    """Return the id of a new batch."""
    return f"batch_{uuid.uuid4().hex}"


def answered_line(
    number: int, custom_id: str, status: int, request_id: str, body: bytes
) -> LineAnswer:
    """Return the answer of an endpoint to a line.

    Args:
        body: JSON text.
    """
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    return _line(number, custom_id, status < 300, response, None)


def refused_line(number: int, custom_id: str | None, code: str, message: str) -> LineAnswer:
    """Return the answer to a line that reached no endpoint."""
    return _line(number, custom_id, False, None, {"code": code, "message": message})


def _line(
    number: int,
    custom_id: str | None,
    good: bool,
    response: dict[str, Any] | None,
    error: dict[str, str] | None,
) -> LineAnswer:
    entry = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": error,
    }
    return LineAnswer(number, good, msgspec.json.encode(entry))
