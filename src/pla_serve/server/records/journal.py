"""Records each request of the API: a log entry, and spans where tracing is configured."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pla_serve.logs import REQUESTS

log = logging.getLogger(REQUESTS)

UNFINISHED = "closed"
"""The outcome of a request that its client left, or that the server gave up."""


@dataclass(slots=True)
class JournalEntry:
    """One HTTP request. Times are monotonic seconds; None: it did not come so far."""

    request_id: str
    arrival: float
    traceparent: Mapping[str, str] = field(default_factory=dict)
    """The client's trace headers, if it sent any."""
    prefill_began: float | None = None
    first_token: float | None = None
    moved: tuple[float, float] | None = None
    """Times of the last token of one instance and the first of the next, if the request moved."""
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    outcome: str = UNFINISHED
    """The finish reason of its last choice, refused, error, or closed."""


class Journal(Protocol):
    """Receives an entry for each request that has ended. `write` must not block or raise."""

    def write(self, entry: JournalEntry) -> None: ...


class LogJournal:
    """Writes a log entry for each request, at level info."""

    def write(self, entry: JournalEntry) -> None:
        """One line; its numbers are fields of their own in JSON."""
        if not log.isEnabledFor(logging.INFO):
            return
        numbers = {
            "seconds": round(entry.ended - entry.arrival, 4),
            "queue_seconds": _since(entry.arrival, entry.prefill_began),
            "ttft_seconds": _since(entry.arrival, entry.first_token),
            "prompt_tokens": entry.prompt_tokens,
            "transfer_seconds": _since(*entry.moved) if entry.moved else None,
            "cached_tokens": entry.cached_tokens,
            "completion_tokens": entry.completion_tokens,
            "outcome": entry.outcome,
        }
        log.info("request: %s", entry.outcome, extra={**numbers, "request_id": entry.request_id})


class Journals:
    """Passes each entry to several journals."""

    def __init__(self, journals: Sequence[Journal]) -> None:
        self._journals = journals

    def write(self, entry: JournalEntry) -> None:
        for journal in self._journals:
            journal.write(entry)


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else round(end - start, 4)
