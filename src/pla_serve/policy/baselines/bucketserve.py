"""Batches of similar length, from buckets that split and merge: after BucketServe."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.pending import Pending
from pla_serve.policy.queues import SortedQueue, arrival_rank


@dataclass(frozen=True, slots=True)
class BucketOptions:
    """Knobs of `bucketserve`.

    Raises:
        ValueError: a field is out of range.
    """

    longest_tokens: int = 131_072
    """Upper end of the one bucket that there is at first; longer prompts are in the last one."""
    skew: float = 0.5
    """A bucket is split if more than this share of it lies below its midpoint, 0 to 1."""
    order: Literal["fcfs", "sjf"] = "fcfs"
    """Which bucket is next: that of the request that came first, or that of the shortest ones."""

    def __post_init__(self) -> None:
        if self.longest_tokens < 1:
            raise ValueError(f"longest_tokens must be at least 1, not {self.longest_tokens}")
        if not 0 <= self.skew < 1:
            raise ValueError(f"skew must be at least 0 and below 1, not {self.skew}")


@dataclass(slots=True)
class Bucket:
    """Requests with ``low`` to ``high`` - 1 new tokens, first come, first served."""

    low: int
    high: int
    queue: SortedQueue = field(default_factory=lambda: SortedQueue(arrival_rank))
    below: int = 0
    """How many of them lie below the midpoint."""

    @property
    def middle(self) -> int:
        """Where it would be split."""
        return (self.low + self.high) // 2


class BucketQueue:
    """One bucket at a time. Splits and merges at the begin of a round, which is a `drain`.

    A request moves to another bucket at most once for each halving of the range between two merges,
    and a merge moves fewer than ``batch_requests``; so a round costs O(buckets) on average.
    """

    def __init__(self, options: BucketOptions, batch_requests: int) -> None:
        self._options = options
        self._batch_requests = batch_requests
        self._size = 0
        self._set([Bucket(0, options.longest_tokens)])

    @property
    def bounds(self) -> list[int]:
        """The low ends of the buckets, ascending."""
        return list(self._lows)

    def __len__(self) -> int:
        return self._size

    def push(self, request: Pending) -> None:
        self._put(request)
        self._size += 1

    def discard(self, request: Pending) -> None:
        if request.entry is None:
            return
        bucket = self._bucket(request)
        bucket.queue.discard(request)
        bucket.below -= request.new_tokens < bucket.middle
        self._size -= 1

    def drain(self, now: float) -> Iterator[Pending]:
        """Take out the requests of one bucket; a batch never holds those of two."""
        self._adjust()
        bucket = self._next()
        if bucket is None:
            return
        for request in bucket.queue.drain(now):
            bucket.below -= request.new_tokens < bucket.middle
            self._size -= 1
            yield request

    def resort(self) -> None:
        """Nothing here depends on predicted times."""

    def seconds_ahead(self, request: Pending, total: float) -> float:
        """All of it; under ``sjf`` what is in the request's bucket and in shorter ones."""
        if self._options.order == "fcfs":
            return total
        count = bisect_right(self._lows, request.new_tokens)
        ahead = (b.queue.seconds_ahead(request, inf) for b in self._buckets[:count])
        return min(total, sum(ahead))

    def _next(self) -> Bucket | None:
        """The bucket whose head is the most urgent, then by ``order``."""
        best, best_rank = None, None
        for bucket in self._buckets:
            head = bucket.queue.first()
            if head is None:
                continue
            rank = arrival_rank(head)
            if self._options.order == "sjf":
                rank = (*rank[:1], -bucket.low)
            if best_rank is None or rank > best_rank:
                best, best_rank = bucket, rank
        return best

    def _adjust(self) -> None:
        """Merge all when a single batch would take them; else split what is full and skewed."""
        if self._size < self._batch_requests:
            if len(self._buckets) > 1:
                self._rebuild([Bucket(0, self._options.longest_tokens)], self._buckets)
            return
        crowded = [bucket for bucket in self._buckets if self._splits(bucket)]
        for bucket in crowded:
            halves = [Bucket(bucket.low, bucket.middle), Bucket(bucket.middle, bucket.high)]
            others = [other for other in self._buckets if other is not bucket]
            self._rebuild(sorted([*others, *halves], key=lambda b: b.low), [bucket])

    def _splits(self, bucket: Bucket) -> bool:
        count = len(bucket.queue)
        skewed = bucket.below > self._options.skew * count
        return count > self._batch_requests and skewed and bucket.middle > bucket.low

    def _rebuild(self, buckets: list[Bucket], emptied: list[Bucket]) -> None:
        self._set(buckets)
        for bucket in emptied:
            for request in bucket.queue.requests():
                self._put(request)

    def _set(self, buckets: list[Bucket]) -> None:
        self._buckets = buckets
        self._lows = [bucket.low for bucket in buckets]

    def _put(self, request: Pending) -> None:
        bucket = self._bucket(request)
        bucket.queue.push(request)
        bucket.below += request.new_tokens < bucket.middle

    def _bucket(self, request: Pending) -> Bucket:
        return self._buckets[bisect_right(self._lows, request.new_tokens) - 1]


def bucketserve(
    config: PolicyConfig, cost: CostModel, options: BucketOptions | None = None
) -> ContinuousBatching:
    """Batches of one length bucket at a time, after BucketServe (arXiv 2507.17120).

    Buckets are split at their midpoint while they hold more than a batch takes and are skewed to
    the short side, and merged into one when all that waits fits a batch, ``max_batch_requests``.
    The bucket of the request that came first is next; within one it is first come, first served.
    Batches are bounded by ``max_batch_tokens``, where BucketServe computes a bound from the free
    memory; it pads to the longest of a batch, the engines here do not. The length is that of the
    uncached tokens. A prompt that has begun goes on first. Deadlines and ``aging`` are not used.
    """
    queue = BucketQueue(options or BucketOptions(), config.max_batch_requests)
    return ContinuousBatching(config, cost, queue)
