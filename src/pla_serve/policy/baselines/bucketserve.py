"""Batches of similar length, from buckets that split and merge: after BucketServe."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Literal, Self

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import CONTINUOUS_SETTINGS, PolicyKind
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pending import Pending
from pla_serve.policy.queues import SortedQueue, arrival_rank


@dataclass(frozen=True, slots=True)
class BucketOptions:
    """Knobs of `bucketserve`.

    Raises:
        ValueError: a field is out of range.
    """

    longest_tokens: Annotated[
        int,
        Knob(
            "Upper end of the one bucket that there is at first; longer prompts are in the last "
            "bucket.",
            unit="tokens",
            least=1,
        ),
    ] = 131_072
    skew: Annotated[
        float,
        Knob(
            "A bucket is split if more than this share of its requests lies below its midpoint.",
            least=0,
            below=1,
        ),
    ] = 0.5
    order: Annotated[
        Literal["fcfs", "sjf"],
        Knob("Next bucket: fcfs takes that of the request that came first, sjf the shortest."),
    ] = "fcfs"

    def __post_init__(self) -> None:
        check_knobs(self)


@dataclass(slots=True, eq=False)
class Bucket:
    """Requests with ``low`` to ``high`` - 1 new tokens, first come, first served."""

    low: int
    high: int
    queue: SortedQueue = field(default_factory=lambda: SortedQueue(arrival_rank))
    tokens: int = 0
    """New tokens of all requests in the bucket."""
    below: int = 0
    """Number of requests below the midpoint."""

    @property
    def middle(self) -> int:
        """Length at which the bucket is split."""
        return (self.low + self.high) // 2

    def push(self, request: Pending) -> None:
        """Add a request."""
        self.queue.push(request)
        self._count(request, 1)

    def left(self, request: Pending) -> None:
        """Count off a request that was taken out of ``queue``."""
        self._count(request, -1)

    def _count(self, request: Pending, sign: int) -> None:
        self.tokens += sign * request.new_tokens
        self.below += sign * (request.new_tokens < self.middle)


class BucketQueue:
    """Prefills in buckets of similar length, of which a batch takes one.

    Buckets are split and merged at the begin of each `drain`. A request moves to another bucket at
    most once for each halving of the range between two merges, and a merge moves fewer than
    ``batch_requests``; so a `drain` costs O(buckets) on average.
    """

    def __init__(self, options: BucketOptions, batch_requests: int, batch_tokens: int) -> None:
        self._options = options
        self._batch_requests = batch_requests
        self._batch_tokens = batch_tokens
        self._size = 0
        self._set([Bucket(0, options.longest_tokens)])

    @property
    def buckets(self) -> list[Bucket]:
        """All buckets, from short to long. Together they cover every length."""
        return self._buckets

    def __len__(self) -> int:
        return self._size

    def push(self, request: Pending) -> None:
        self._bucket(request).push(request)
        self._size += 1

    def discard(self, request: Pending) -> None:
        if request.entry is None:
            return
        bucket = self._bucket(request)
        bucket.queue.discard(request)
        bucket.left(request)
        self._size -= 1

    def drain(self, now: float) -> Iterator[Pending]:
        """Take out the requests of one bucket; a batch never holds those of two."""
        self._adjust()
        bucket = self._next()
        if bucket is None:
            return
        for request in bucket.queue.drain(now):
            bucket.left(request)
            self._size -= 1
            yield request

    def split_off(self) -> Self:
        other = copy(self)
        self._size = 0
        self._set([Bucket(0, self._options.longest_tokens)])
        return other

    def resort(self) -> None:
        """Do nothing: no predicted time decides the order."""

    def seconds_ahead(self, request: Pending, total: float) -> float:
        """Return ``total``; under ``sjf`` only the work in the same and in shorter buckets."""
        if self._options.order == "fcfs":
            return total
        count = bisect_right(self._lows, request.new_tokens)
        ahead = (b.queue.seconds_ahead(request, inf) for b in self._buckets[:count])
        return min(total, sum(ahead))

    def _next(self) -> Bucket | None:
        """Return the bucket whose first request is the most urgent, then by ``order``."""
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
        """Merge all buckets if one batch takes all requests, else split full and skewed ones.

        Splitting ends, because each split halves a range.
        """
        if self._fits(self._size, sum(bucket.tokens for bucket in self._buckets)):
            if len(self._buckets) > 1:
                self._replace(self._buckets, [Bucket(0, self._options.longest_tokens)])
            return
        crowded = [bucket for bucket in self._buckets if self._splits(bucket)]
        while crowded:
            bucket = crowded.pop()
            halves = [Bucket(bucket.low, bucket.middle), Bucket(bucket.middle, bucket.high)]
            self._replace([bucket], halves)
            crowded += [half for half in halves if self._splits(half)]

    def _fits(self, requests: int, tokens: int) -> bool:
        return requests <= self._batch_requests and tokens <= self._batch_tokens

    def _splits(self, bucket: Bucket) -> bool:
        count = len(bucket.queue)
        skewed = bucket.below > self._options.skew * count
        return skewed and bucket.middle > bucket.low and not self._fits(count, bucket.tokens)

    def _replace(self, old: list[Bucket], new: list[Bucket]) -> None:
        kept = [bucket for bucket in self._buckets if bucket not in old]
        self._set(sorted([*kept, *new], key=lambda bucket: bucket.low))
        for bucket in old:
            for request in bucket.queue.requests():
                self._bucket(request).push(request)

    def _set(self, buckets: list[Bucket]) -> None:
        self._buckets = buckets
        self._lows = [bucket.low for bucket in buckets]

    def _bucket(self, request: Pending) -> Bucket:
        return self._buckets[bisect_right(self._lows, request.new_tokens) - 1]


def bucketserve(
    config: PolicyConfig, cost: CostModel, options: BucketOptions | None = None
) -> ContinuousBatching:
    """Batches of one length bucket at a time, after BucketServe (arXiv 2507.17120).

    A bucket is split at its midpoint while it holds more than one batch takes and is skewed to the
    short side; all are merged when one batch takes everything. A batch takes
    ``max_batch_requests`` and ``max_batch_tokens``, where BucketServe computes a bound from the
    free memory; it pads to the longest of a batch, the engines here do not. Buckets go by the
    uncached tokens left, and the bucket of the request that came first is next; within one it is
    first come, first served. A prompt that has begun goes on first, unless ``order`` is ``sjf``
    and shorter ones wait. Deadlines are not used.
    """
    options = options or BucketOptions()
    queue = BucketQueue(options, config.max_batch_requests, config.max_batch_tokens)
    return ContinuousBatching(config, cost, queue)


POLICY = PolicyKind(
    name="bucketserve",
    summary="batches of similar length, after BucketServe",
    make=bucketserve,
    options=BucketOptions,
    settings=CONTINUOUS_SETTINGS,
)
