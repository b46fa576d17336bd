"""The short queue Q_s, grouped by length so that a batch pads little."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from copy import copy
from heapq import merge
from itertools import islice
from typing import Self

from pla_serve.policy.pending import Pending
from pla_serve.policy.queues import SortedQueue, arrival_rank


class LengthLevels:
    """Short prefills by level, first come, first served within each.

    A level is the token count of a captured shape: a prefill of 20 new tokens is of level 32,
    because 32 is the smallest shape that takes it. Prefills longer than every shape share a last
    level. A more urgent priority goes first, and a prefill that has begun goes on first.

    Finding the head, the group of a level or the earliest deadline takes time in proportion to the
    number of levels and the size of the group, whatever waits.

    Args:
        tops: tokens of the captured shapes.
    """

    def __init__(self, tops: Iterable[int]) -> None:
        self._tops = sorted(set(tops))
        self._queues = [SortedQueue(arrival_rank) for _ in range(len(self._tops) + 1)]
        self._deadlines: list[tuple[float, int, Pending]] = []

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def push(self, request: Pending) -> None:
        """Queue a request that is not queued."""
        self._queues[self.level(request.new_tokens)].push(request)
        if request.deadline is not None:
            insort(self._deadlines, (request.deadline, request.order, request))

    def discard(self, request: Pending) -> None:
        """Take a request out, if it is queued."""
        if request.entry is None:
            return
        self._queues[self.level(request.new_tokens)].discard(request)
        if request.deadline is not None:
            del self._deadlines[bisect_left(self._deadlines, (request.deadline, request.order))]

    def drain(self, now: float) -> Iterator[Pending]:
        """Take requests out, first to last over all levels, each when it is asked for."""
        while (head := self.head()) is not None:
            self.discard(head)
            yield head

    def split_off(self) -> Self:
        """Return a queue with all requests, and be empty."""
        other = copy(self)
        self._queues = [SortedQueue(arrival_rank) for _ in self._queues]
        self._deadlines = []
        return other

    def resort(self) -> None:
        """Do nothing: no predicted time decides the order."""

    def seconds_ahead(self, request: Pending, total: float) -> float:
        """Work before a newcomer: everything that waits."""
        return total

    def level(self, tokens: int) -> int:
        """Index of the level of a prefill with so many new tokens."""
        return bisect_left(self._tops, tokens)

    def head(self) -> Pending | None:
        """The request that goes first."""
        heads = [head for queue in self._queues if (head := queue.first()) is not None]
        return max(heads, key=_rank, default=None)

    def most_urgent(self) -> Pending | None:
        """The request with the earliest deadline."""
        return self._deadlines[0][2] if self._deadlines else None

    def of_level(self, level: int) -> Iterator[Pending]:
        """Requests of a level, first to last; they stay queued."""
        return self._queues[level].in_order()

    def shorter(self, level: int, most: int) -> list[Pending]:
        """The first ``most`` requests of all levels below ``level``; they stay queued."""
        return self._merged(self._queues[:level], most)

    def oldest(self, most: int) -> list[Pending]:
        """The first ``most`` requests of all levels; they stay queued."""
        return self._merged(self._queues, most)

    def _merged(self, queues: list[SortedQueue], most: int) -> list[Pending]:
        orders = (queue.in_order() for queue in queues if queue)
        return list(islice(merge(*orders, key=_rank, reverse=True), most))


def _rank(request: Pending) -> tuple[float, ...]:
    """Orders the heads of the levels among themselves; the greatest goes first."""
    return (*arrival_rank(request), -request.order)
