"""Order of long prefills, and the batches of them that run inside one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import Batch, Chunk
from pla_serve.policy.queues import DEMOTIONS, SortedQueue
from pla_serve.policy.tuning import Tuning

BULK_PATIENCE = 600.0
"""Bulk work is due so many seconds later than it would be if somebody waited for it."""
Patience = Callable[[float], float]
"""Increasing function: from the seconds of prefill left to the seconds between arrival and due
time."""


class LongQueue(SortedQueue):
    """Earliest due first, where a long prefill is due the later the more of it is left.

    ``due = arrival + patience(seconds left)``. So short remaining times go first, and each request
    is passed only by those that arrive within ``patience(its seconds)`` after it. A deadline that
    can still be met makes a request due when it would have to start. One that cannot be met any
    more makes it due after ``late_patience``: it steps behind those that can be saved, once. Nobody
    is due before it came, so that a flood of requests without hope passes nobody for longer than
    another flood does. Bulk work is due `BULK_PATIENCE` later, and has no deadline.

    Args:
        late_patience: at least ``patience``.
    """

    def __init__(self, patience: Patience, late_patience: Patience) -> None:
        super().__init__(lambda request: (-request.priority, -self.due(request)))
        self._patience = patience
        self._late_patience = late_patience

    def due(self, request: Pending, less: float = 0.0) -> float:
        """Return the time at which a request is due if ``less`` seconds of its prefill are done."""
        left = max(0.0, request.seconds - less)
        if request.late:
            return request.arrival + self._late_patience(left)
        due = request.arrival + self._patience(left)
        if request.bulk:
            return due + BULK_PATIENCE
        if request.deadline is None:
            return due
        return min(due, max(request.arrival, request.deadline - left))

    def head(self, now: float) -> Pending | None:
        """Return the first request, after moving back those whose deadline is out of reach now."""
        for _ in range(DEMOTIONS):
            first = self.first()
            if first is None or not self.give_up(first, now):
                return first
        return self.first()

    def give_up(self, request: Pending, now: float, less: float = 0.0) -> bool:
        """Move a request back if its deadline is out of reach; True if that is new.

        Args:
            less: seconds of it that were done already.
        """
        deadline = None if request.bulk else request.deadline
        if request.late or deadline is None or now + request.seconds - less <= deadline:
            return False
        queued = request.entry is not None
        self.discard(request)
        request.late = True
        if queued:
            self.push(request)
        return True


class Spread:
    """Whether the times of long prefills are spread so widely that their order should follow them.

    First come, first served has the shortest worst waits if times are much alike, and shortest
    remaining first if a few are far longer than the rest (Wierman and Zwart, "Is tail-optimal
    scheduling possible?", 2012). The measure is the squared coefficient of variation: 0 for equal
    times, 1 for an exponential distribution, 3 to 8 in recorded traffic with documents in it.
    Where hardly anything is short, the worst waits among longs are the worst waits of all, so that
    more is asked for.
    """

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning or Tuning()
        self._keep = 1 - 1 / self._tuning.spread_memory
        self._requests = self._longs = self._sum = self._squares = 0.0
        self.heavy = False

    @property
    def mixed(self) -> bool:
        """Whether recent prefills are of both classes: at least a hundredth of either."""
        least = 0.01 * self._requests
        return self._longs >= least and self._requests - self._longs >= least

    def add(self, seconds: float, short: bool) -> bool:
        """Count a request; True if ``heavy`` changed with it."""
        self._requests = self._requests * self._keep + 1
        if short:
            return False
        self._longs = self._longs * self._keep + 1
        self._sum = self._sum * self._keep + seconds
        self._squares = self._squares * self._keep + seconds * seconds
        tuning = self._tuning
        if self._longs < tuning.least_seen or self._sum == 0:
            return False
        variation = self._squares * self._longs / self._sum**2 - 1
        alone = self._longs >= tuning.mostly * self._requests
        heavy = tuning.heavy_alone if alone else tuning.heavy
        was = self.heavy
        self.heavy = variation >= (heavy * tuning.hysteresis if was else heavy)
        return self.heavy is not was


@dataclass(slots=True)
class RunningPrefill:
    """A batch of longs that is being computed."""

    pending: Pending
    """Prefill that the batch was begun for; others may share its launch."""
    members: set[str]
    """Ids of the requests in the batch that are not computed yet, with decode steps."""
    seconds: float
    """Predicted seconds of the batch, without pauses."""
    riders: bool = False
    """Whether the batch has decode steps."""
    ran: float = 0.0
    """Seconds it has run so far."""
    inside: float = 0.0
    """Predicted seconds of the long prefills that were begun inside this batch."""

    @property
    def rest(self) -> float:
        """Predicted seconds to its end."""
        return max(0.0, self.seconds - self.ran)

    @property
    def left(self) -> float:
        """Predicted seconds until the whole prefill of ``pending`` is done."""
        return max(0.0, self.pending.seconds - self.ran)


class RunningPrefills:
    """Batches that run inside one another, outermost first; only the last one makes progress."""

    def __init__(self) -> None:
        self._flights: list[RunningPrefill] = []

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[RunningPrefill]:
        return iter(self._flights)

    @property
    def top(self) -> RunningPrefill | None:
        """The innermost batch, which runs unless express work does."""
        return self._flights[-1] if self._flights else None

    def take_off(self, pending: Pending, batch: Batch, seconds: float) -> None:
        """Add the batch that begins now; ``seconds`` is its predicted time."""
        members = {chunk.request_id for chunk in batch.prefills}
        self._flights.append(RunningPrefill(pending, members, seconds))

    def board(self, riders: Sequence[Chunk]) -> None:
        """Add decode steps to the innermost batch."""
        top = self._flights[-1]
        top.members.update(chunk.request_id for chunk in riders)
        top.riders = True

    def land(self, request_id: str) -> None:
        """Remove a request that is computed or was taken back, and batches without requests."""
        for running in self._flights:
            running.members.discard(request_id)
        self._flights = [running for running in self._flights if running.members]
