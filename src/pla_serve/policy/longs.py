"""Long prefills: who goes first, and which of them run inside one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pla_serve.policy.pending import Pending
from pla_serve.policy.queues import SortedQueue

SWITCH_MARGIN = 0.1
"""Share of its remaining time by which another long must undercut the one that has begun."""
DEMOTIONS = 4
"""Late requests that one look at the queue puts back, so that a decision stays quick."""

Patience = Callable[[float], float]
"""Seconds of prefill left to the seconds after its arrival at which a request is due; growing."""


class LongQueue(SortedQueue):
    """Earliest due first, where a long prefill is due the later the more of it is left.

    ``due = arrival + patience(seconds left)``. So short remaining times go first, and each request
    is passed only by those that arrive within ``patience(its seconds)`` after it. A deadline that
    can still be met makes a request due when it would have to start; one that cannot be met any
    more counts no longer.
    """

    def __init__(self, patience: Patience) -> None:
        super().__init__(lambda request: (-request.priority, -self.due(request)))
        self._patience = patience

    def due(self, request: Pending, less: float = 0.0) -> float:
        """When it is due, if ``less`` seconds of it were done already."""
        left = max(0.0, request.seconds - less)
        due = request.arrival + self._patience(left)
        if request.deadline is None or request.late:
            return due
        return min(due, request.deadline - left)

    def head(self, now: float) -> Pending | None:
        """The first, after those that turned late were put where they belong."""
        for _ in range(DEMOTIONS):
            first = self.first()
            if first is None or first.late or first.deadline is None:
                return first
            if now + first.seconds <= first.deadline:
                return first
            self.discard(first)
            first.late = True
            self.push(first)
        return self.first()


@dataclass(slots=True)
class Flight:
    """A chunk of a long prefill that is being computed."""

    pending: Pending
    ran: float = 0.0
    """Seconds it has run so far, pauses not counted."""

    @property
    def left(self) -> float:
        """Predicted seconds until its whole prefill is done."""
        return max(0.0, self.pending.seconds - self.ran)


class Flights:
    """Chunks that run inside one another, the outermost first; only the last one makes progress."""

    def __init__(self) -> None:
        self._flights: list[Flight] = []

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._flights)

    @property
    def top(self) -> Flight | None:
        """The one that runs, or would but for express work."""
        return self._flights[-1] if self._flights else None

    def take_off(self, pending: Pending) -> None:
        """A chunk of it begins."""
        self._flights.append(Flight(pending))

    def land(self, request_id: str) -> None:
        """It is over, or was taken back."""
        self._flights = [f for f in self._flights if f.pending.id != request_id]
