"""Orders of prefills. Each is a static key, so that time passing sorts nothing again."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, Protocol, Self

from pla_serve.policy.pending import Pending

PATIENCE = 5.0
"""Seconds after its arrival at which a short request without a deadline counts as due."""
DEMOTIONS = 4
"""Late requests that one `DueQueue.drain` puts back, so that a decision stays quick."""
NEAR = 256
SAMPLES = 16
"""Requests looked at to estimate the work that goes before a newcomer."""

Rank = tuple[float, ...]
"""The greatest goes first; all ranks of a queue have one length."""


class PrefillSource(Protocol):
    """Pending prefills that a batch is filled from."""

    def __len__(self) -> int: ...

    def drain(self, now: float) -> Iterator[Pending]:
        """Take requests out, first to last, each when it is asked for."""
        ...


class PrefillQueue(PrefillSource, Protocol):
    """An order among pending prefills."""

    def push(self, request: Pending) -> None:
        """Queue a request that is not queued."""
        ...

    def discard(self, request: Pending) -> None:
        """Take a request out, if it is queued."""
        ...

    def resort(self) -> None:
        """Renew the order after ``Pending.seconds`` of its requests changed."""
        ...

    def split_off(self) -> Self:
        """Return a queue with all requests, in their order, and be empty; O(1) in requests."""
        ...

    def seconds_ahead(self, request: Pending, total: float) -> float:
        """Estimated work in front of ``request``, were it pushed; ``total`` is all that waits."""
        ...


class SortedQueue:
    """Highest rank first, in one sorted list with the first request at its end.

    Taking the first is O(1). Inserting and discarding are a binary search and a block move of 8
    bytes a request: a few microseconds at 10,000 requests, less than a heap in Python takes for a
    decision that pops thirty of them.
    """

    def __init__(self, rank: Callable[[Pending], Rank]) -> None:
        self._rank = rank
        self._entries: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, request: Pending) -> None:
        entries = self._entries
        entry = (*self._rank(request), -request.order, request)
        request.entry = entry
        near = len(entries) - NEAR  # most that come back belong near the front: look there first
        insort(entries, entry, near if near > 0 and entries[near] < entry else 0)

    def discard(self, request: Pending) -> None:
        entry = request.entry
        if entry is None:
            return
        if self._entries[-1] is entry:  # mostly it is the first that goes
            self._entries.pop()
        else:
            del self._entries[bisect_left(self._entries, entry)]
        request.entry = None

    def drain(self, now: float) -> Iterator[Pending]:
        entries = self._entries
        while entries:
            request = entries.pop()[-1]
            request.entry = None
            yield request

    def first(self) -> Pending | None:
        """The request that `drain` would take first."""
        return self._entries[-1][-1] if self._entries else None

    def in_order(self) -> Iterator[Pending]:
        """All requests, first to last; they stay queued, and nothing may be queued meanwhile."""
        return (entry[-1] for entry in reversed(self._entries))

    def requests(self) -> list[Pending]:
        """All requests, the last one first."""
        return [entry[-1] for entry in self._entries]

    def split_off(self) -> Self:
        other = copy(self)
        self._entries = []
        return other

    def resort(self) -> None:
        requests = self.requests()
        self._entries = [(*self._rank(request), -request.order, request) for request in requests]
        self._entries.sort()
        for entry in self._entries:
            entry[-1].entry = entry

    def seconds_ahead(self, request: Pending, total: float) -> float:
        """Exact up to SAMPLES requests ahead, else from as many, evenly spaced."""
        size = len(self._entries)
        ahead = size - bisect_left(self._entries, (*self._rank(request), -request.order))
        if ahead == 0:
            return 0.0
        step = max(1, ahead // SAMPLES)
        sampled = self._entries[size - ahead :: step]
        mean: float = sum(entry[-1].seconds for entry in sampled) / len(sampled)
        return min(total, ahead * mean)


class DueQueue(SortedQueue):
    """Short requests: a deadline that can still be met first, then arrival; started ones foremost.

    A request is due at its deadline, but no later than PATIENCE after its arrival; so without
    deadlines the order is first come, first served, and a deadline only moves a request forward.
    One whose deadline can no longer be met is due 2 * PATIENCE after its arrival: it steps behind
    those that can be saved, once. Whoever arrives after that moment never passes it, so its wait
    is bounded in any flood.
    """

    def __init__(self) -> None:
        super().__init__(due_rank)

    def drain(self, now: float) -> Iterator[Pending]:
        entries, demotions = self._entries, DEMOTIONS
        while entries:
            request = entries.pop()[-1]
            deadline = request.deadline
            if (
                deadline is not None
                and demotions > 0
                and not request.late
                and now + request.seconds > deadline
            ):
                request.late = True
                demotions -= 1
                self.push(request)
                continue
            request.entry = None
            yield request


def arrival_rank(request: Pending) -> Rank:
    """First come, first served; a prefill under way is finished first."""
    return (-request.priority, request.started, -request.arrival)


def due_rank(request: Pending) -> Rank:
    """The order of `DueQueue`."""
    arrival = request.arrival
    if request.late:
        due = arrival + 2 * PATIENCE
    elif request.deadline is None:
        due = arrival + PATIENCE
    else:
        due = max(arrival, min(request.deadline, arrival + PATIENCE))
    return (-request.priority, request.started, -due, -arrival)


def aged_rank(aging: float) -> Callable[[Pending], Rank]:
    """Shortest remaining first, less ``aging`` seconds for each second waited.

    ``remaining - aging * (now - arrival)`` orders two requests alike at every ``now``, because
    ``aging * now`` is the same on both sides. What is left, ``remaining + aging * arrival``, does
    not change while a request waits. So a request is passed only by those that arrive within
    ``remaining / aging`` seconds after it; with ``aging`` 0 that has no end.
    """

    def rank(request: Pending) -> Rank:
        return (-request.priority, -(request.seconds + aging * request.arrival))

    return rank
