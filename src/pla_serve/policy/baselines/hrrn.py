"""Highest response ratio next, on uncached length: a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from heapq import heapify, heappop, heapreplace
from math import floor, log2
from typing import Self

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import CONTINUOUS_SETTINGS, PolicyKind
from pla_serve.policy.pending import Pending
from pla_serve.policy.queues import SortedQueue, arrival_rank

STEPS_PER_OCTAVE = 4


class ResponseRatioQueue:
    """Priority, then the highest (wait + service) / service.

    Ratios change order as time passes, so no static key exists. Requests whose predicted service
    lies within a quarter of an octave share a first-come queue, and only the heads are scored: a
    few dozen, whatever waits. Within such a queue two requests may stand in the wrong order by at
    most 19% of their ratio.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[int, int], SortedQueue] = {}
        self._of: dict[str, tuple[int, int]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, request: Pending) -> None:
        key = (request.priority, floor(STEPS_PER_OCTAVE * log2(max(request.seconds, 1e-9))))
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = SortedQueue(arrival_rank)
        bucket.push(request)
        self._of[request.id] = key
        self._size += 1

    def discard(self, request: Pending) -> None:
        key = self._of.pop(request.id, None)
        if key is None:
            return
        bucket = self._buckets[key]
        bucket.discard(request)
        if not bucket:
            del self._buckets[key]
        self._size -= 1

    def drain(self, now: float) -> Iterator[Pending]:
        heap = [_score(bucket, now) for bucket in self._buckets.values()]
        heapify(heap)
        while heap:
            bucket = heap[0][3]
            request = next(bucket.drain(now))
            key = self._of.pop(request.id)
            self._size -= 1
            if bucket:
                heapreplace(heap, _score(bucket, now))
            else:
                heappop(heap)
                del self._buckets[key]
            yield request

    def split_off(self) -> Self:
        other = copy(self)
        self._buckets, self._of, self._size = {}, {}, 0
        return other

    def resort(self) -> None:
        requests = [r for bucket in self._buckets.values() for r in bucket.requests()]
        self._buckets.clear()
        self._size = 0
        for request in requests:
            self.push(request)

    def seconds_ahead(self, request: Pending, total: float) -> float:
        """Return ``total``: a newcomer has the lowest ratio.

        That is too much for a small one, which soon passes others.
        """
        return total


def _score(bucket: SortedQueue, now: float) -> tuple[int, float, int, SortedQueue]:
    """Smallest first: priority, the ratio's negative, order of arrival to break ties."""
    head = bucket.first()
    assert head is not None
    return (head.priority, (head.arrival - now) / max(head.seconds, 1e-9), head.order, bucket)


def hrrn(config: PolicyConfig, cost: CostModel) -> ContinuousBatching:
    """Serves by (wait + service) / service, service being the predicted time of what is left.

    Deadlines are not used.
    """
    return ContinuousBatching(config, cost, ResponseRatioQueue())


POLICY = PolicyKind(
    name="hrrn",
    summary="highest response ratio next, as in SGLang",
    make=hrrn,
    settings=CONTINUOUS_SETTINGS,
)
