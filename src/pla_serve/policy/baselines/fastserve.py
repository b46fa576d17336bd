"""Skip-join multi-level feedback queue: after FastServe."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from math import inf
from typing import Annotated, Self

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import CONTINUOUS_SETTINGS, PolicyKind
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import Batch
from pla_serve.policy.queues import Rank, SortedQueue


@dataclass(frozen=True, slots=True)
class FeedbackOptions:
    """Knobs of `FastServe`.

    Raises:
        ValueError: a field is out of range.
    """

    levels: Annotated[int, Knob("Number of queues.", unit="queues", least=1)] = 10
    quantum_seconds: Annotated[
        float,
        Knob(
            "Quantum of the first level; the last level's has no end.",
            unit="seconds",
            above=0,
            finite=False,
        ),
    ] = 0.02
    ratio: Annotated[
        float, Knob("Quantum of a level divided by that of the level before.", least=1)
    ] = 2.0
    starve_seconds: Annotated[
        float,
        Knob(
            "A request that has not been served for so long moves to the first level.",
            unit="seconds",
            above=0,
            finite=False,
        ),
    ] = 10.0

    def __post_init__(self) -> None:
        check_knobs(self)


@dataclass(slots=True)
class Place:
    """Level of a request, and what it has used of that level's quantum."""

    level: int
    joined: float
    """Time at which the request came to this level; within a level the earlier goes first."""
    since: float
    """Time at which the request was served last, was promoted, or arrived."""
    used: float = 0.0
    """Seconds of service in this level."""


class FeedbackQueue:
    """Multi-level queue: orders by priority, then by level, the lowest level first.

    The order is a static key, so a request changes its level by a removal and an insertion. The
    request that has waited longest is the first of a list in order of `Place.since`.
    """

    def __init__(self, options: FeedbackOptions) -> None:
        self._options = options
        quanta = [options.quantum_seconds * options.ratio**n for n in range(options.levels - 1)]
        self._quanta = [*quanta, inf]
        self._sorted = SortedQueue(self._rank)
        self._places: dict[str, Place] = {}
        self._waiting: OrderedDict[str, Pending] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sorted)

    def level(self, request_id: str) -> int | None:
        """Return the level of a request, from 0; None if it is unknown."""
        place = self._places.get(request_id)
        return None if place is None else place.level

    def push(self, request: Pending) -> None:
        """Queue a request: a new one in the first level whose quantum covers its prefill."""
        if request.id not in self._places:
            level = self._fitting(request.seconds)
            self._places[request.id] = Place(level, request.arrival, request.arrival)
        self._sorted.push(request)
        self._waiting[request.id] = request

    def discard(self, request: Pending) -> None:
        self._sorted.discard(request)
        self._places.pop(request.id, None)
        self._waiting.pop(request.id, None)

    def drain(self, now: float) -> Iterator[Pending]:
        self._promote(now)
        for request in self._sorted.drain(now):
            del self._waiting[request.id]
            yield request

    def split_off(self) -> Self:
        other = copy(self)  # with the same places: a request that comes back keeps its level
        self._sorted = SortedQueue(self._rank)
        self._waiting = OrderedDict()
        return other

    def resort(self) -> None:
        """Do nothing: a request leaves its level by its quantum or by starvation only."""

    def seconds_ahead(self, request: Pending, total: float) -> float:
        return self._sorted.seconds_ahead(request, total)

    def charge(self, batch: Batch, seconds: float, now: float) -> None:
        """Charge ``seconds`` to every request of ``batch``; a used-up quantum demotes it."""
        for chunk in batch.prefills:
            place = self._places.get(chunk.request_id)
            if place is None or chunk.request_id in self._waiting:
                continue  # removed while it ran, perhaps added anew
            if chunk.completes:
                del self._places[chunk.request_id]
                continue
            place.since = now
            place.used += seconds
            if place.used >= self._quanta[place.level]:
                place.level += 1
                place.joined = now
                place.used = 0.0

    def _promote(self, now: float) -> None:
        starve = self._options.starve_seconds
        while self._waiting:
            request = next(iter(self._waiting.values()))
            place = self._places[request.id]
            if now < place.since + starve:
                return
            place.since = now
            self._waiting.move_to_end(request.id)
            if place.level > 0:
                self._sorted.discard(request)
                place.level, place.joined, place.used = 0, now, 0.0
                self._sorted.push(request)

    def _fitting(self, seconds: float) -> int:
        return min(bisect_left(self._quanta, seconds), len(self._quanta) - 1)

    def _rank(self, request: Pending) -> Rank:
        place = self._places.get(request.id)
        if place is None:  # it is only asked where it would stand
            return (-request.priority, -self._fitting(request.seconds), -request.arrival)
        return (-request.priority, -place.level, -place.joined)


class FastServe(ContinuousBatching):
    """Skip-join multi-level feedback queue, after FastServe (arXiv 2305.05920, NSDI '26).

    A prompt skips the levels whose quantum is below its predicted prefill time. Each batch that it
    is part of counts against the quantum; when that is used up it goes one level down. Who has not
    been served for ``starve_seconds`` goes to the first level. A newcomer in a lower level passes
    a prompt that has begun: preemption between batches, as FastServe's between iterations.

    FastServe keeps decoding requests in the same levels and moves their KV out of the way; here
    levels order prefills only, and decode steps ride along as in all baselines. Its prefill is one
    iteration; here one of more than ``max_batch_tokens`` or ``long_chunk_tokens`` takes several.
    The default quanta and starvation limit are ours. Deadlines are not used.
    """

    def __init__(
        self, config: PolicyConfig, cost: CostModel, options: FeedbackOptions | None = None
    ) -> None:
        self._levels = FeedbackQueue(options or FeedbackOptions())
        super().__init__(config, cost, self._levels)

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        self._levels.charge(batch, seconds, now)
        super().dispatched(batch, now)
        super().measured(batch, seconds, now)

    def dispatched(self, batch: Batch, now: float) -> None:
        """Charges what is predicted: the order is needed before the time is known."""
        self._levels.charge(batch, self._cost.seconds(batch), now)
        super().dispatched(batch, now)


POLICY = PolicyKind(
    name="fastserve",
    summary="multi-level feedback queue, after FastServe",
    make=FastServe,
    options=FeedbackOptions,
    settings=CONTINUOUS_SETTINGS,
)
