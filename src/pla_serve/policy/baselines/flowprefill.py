"""Deadline order with preemption inside a prefill: after FlowPrefill."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal, NamedTuple

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import CONTINUOUS_SETTINGS, PolicyKind
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import Batch, Capabilities, Decision, PrefillRequest
from pla_serve.policy.queues import Rank, SortedQueue


@dataclass(frozen=True, slots=True)
class FlowOptions:
    """Knobs of `FlowPrefill`.

    Raises:
        ValueError: a field is out of range.
    """

    slo_seconds: Annotated[
        float,
        Knob(
            "A request without a deadline is due so long after its arrival, or later by "
            "slo_stretch.",
            unit="seconds",
            least=0,
        ),
    ] = 0.4
    slo_stretch: Annotated[
        float,
        Knob(
            "A request without a deadline is due so many times its own predicted prefill time "
            "after its arrival, if that is more than slo_seconds.",
            least=0,
        ),
    ] = 200.0
    order: Annotated[
        Literal["s-edf", "edf"],
        Knob(
            "s-edf is aware of slack: a request that cannot meet its deadline any more goes after "
            "those that can. edf is plain earliest deadline first."
        ),
    ] = "s-edf"
    batch_tokens: Annotated[
        int,
        Knob(
            "Others join the most urgent request only up to so many tokens together.",
            unit="tokens",
            least=1,
        ),
    ] = 1024

    def __post_init__(self) -> None:
        check_knobs(self)


class DeadlineQueue(SortedQueue):
    """Orders by priority, then requests that can meet their deadline, then the earliest deadline.

    A request is found to be out of reach of its deadline when it comes to the front, at most once.
    So the order is a static key. `drain` stops where a batch should end; see `FlowPrefill`.
    """

    def __init__(self, options: FlowOptions, cost: CostModel) -> None:
        super().__init__(self.rank)
        self._options = options
        self._cost = cost

    def push(self, request: Pending) -> None:
        request.deadline = self._deadline(request)  # fixed by the work that it came with
        super().push(request)

    def head(self, now: float) -> Pending | None:
        """Return the most urgent request, after moving back those that must miss a deadline."""
        while (request := self.first()) is not None:
            if request.late or not self.out_of_reach(request, now):
                return request
            self.discard(request)
            request.late = True
            self.push(request)
        return None

    def out_of_reach(self, request: Pending, now: float) -> bool:
        """Whether a request would miss its deadline even if it ran alone from now on."""
        if self._options.order == "edf":
            return False
        return now + request.seconds > self._deadline(request)

    def drain(self, now: float) -> Iterator[Pending]:
        tokens, seconds, due = 0, 0.0, inf
        while (request := self.head(now)) is not None:
            own_due = inf if request.late else self._deadline(request)
            if tokens == 0:
                seconds = request.seconds
            else:
                seconds += self._added_seconds(request)
                if tokens + request.new_tokens > self._options.batch_tokens:
                    return
                if now + seconds > min(due, own_due):
                    return
            tokens += request.new_tokens
            due = min(due, own_due)
            self.discard(request)
            yield request

    def rank(self, request: Pending) -> Rank:
        """Return the key of the order; the greatest goes first."""
        return self.rank_running(request, -inf)

    def rank_running(self, request: Pending, began: float) -> Rank:
        """Return the key of a request as if it ran alone from ``began`` to its end."""
        late = request.late or self.out_of_reach(request, began)
        return (-request.priority, not late, -self._deadline(request))

    def _deadline(self, request: Pending) -> float:
        if request.deadline is not None:
            return request.deadline
        options = self._options
        slo = max(options.slo_seconds, options.slo_stretch * request.seconds)
        return request.arrival + slo

    def _added_seconds(self, request: Pending) -> float:
        """Return the predicted seconds that a request adds to a batch that runs anyway."""
        new, history = request.new_tokens, request.history
        return self._cost.work_seconds(new, new * (history + new / 2), history + new, 1, 0)


class Paused(NamedTuple):
    """A batch that has given way to another one, which runs inside it."""

    batch: Batch
    began: float
    """Time at which the batch began, plus all pauses so far except the present one."""
    since: float

    def resumed(self, now: float) -> tuple[Batch, float]:
        """Return the batch and its begin, plus the pause that ends at ``now``."""
        return self.batch, self.began + now - self.since


class FlowPrefill(ContinuousBatching):
    """Slack-aware earliest deadline first, preempted between layers: after arXiv 2602.16603.

    Decisions are made when something arrives or completes, and only then. A prefill gives way
    between two layers to an arrival that is more urgent than everyone in its batch, and goes on
    when that is done; what runs inside it gives way in the same manner, to any depth. Others join
    the most urgent request up to ``batch_tokens``, as long as nobody in the batch misses a deadline
    through it. FlowPrefill preempts between operators; a layer is a few of them.

    In the paper every request brings its own objective. Where it brings none, it is due after
    ``slo_seconds``, or ``slo_stretch`` times its own predicted prefill time if that is more; both
    numbers are ours. Who has missed its deadline may wait for ever while others come that can
    make theirs. FlowPrefill serves prefill instances; decode steps ride along here in every batch.

    Uses of `PolicyConfig`: those of `ContinuousBatching`; ``max_batch_tokens`` may be large here.
    """

    capabilities = Capabilities(leaves_at_layer_boundary=True)

    def __init__(
        self, config: PolicyConfig, cost: CostModel, options: FlowOptions | None = None
    ) -> None:
        self._due = DeadlineQueue(options or FlowOptions(), cost)
        super().__init__(config, cost, self._due)
        self._paused: list[Paused] = []
        """Paused batches, each inside the one before it; `_running` is inside the last one."""
        self._event = False
        """Whether a request has arrived or a batch was completed since the last decision."""

    def add(self, request: PrefillRequest, now: float) -> None:
        super().add(request, now)
        self._event = True

    def next(self, now: float) -> Decision:
        self._paused.clear()  # the device is free
        self._running = None
        return super().next(now)

    def at_layer_boundary(self, now: float, running: Batch) -> Batch | None:
        self._skip_to(running)
        if not self._event or not running.prefills:
            return None
        self._event = False
        head = self._due.head(now)
        began = now if self._running is None else self._running[1]
        if head is None or not self._gives_way(running, began, head):
            return None
        batch = self._assembler.batch(self._due, now)
        if batch is not None and self._running is not None:
            self._paused.append(Paused(*self._running, now))
            self._running = (batch, now)
        return batch

    def dispatched(self, batch: Batch, now: float) -> None:
        self._skip_to(batch)
        super().dispatched(batch, now)
        self._event = True
        if self._paused:
            self._running = self._paused.pop().resumed(now)

    def _skip_to(self, batch: Batch) -> None:
        """Drop the innermost batches until ``batch`` is the running one, or a part of it.

        The executor does not report a batch that was taken back as a whole. It shows when the
        executor next names another batch. No time has passed in the dropped ones. An empty
        ``batch`` is what is left of the running one.
        """
        while self._paused and self._running is not None:
            if _ids(batch) <= _ids(self._running[0]):
                return
            paused = self._paused.pop()
            self._running = (paused.batch, paused.began)
            self._event = True

    def _gives_way(self, batch: Batch, began: float, head: Pending) -> bool:
        """Whether ``head`` is more urgent than all requests in ``batch``, which has begun."""
        ranks = []
        for chunk in batch.prefills:
            pending = self._book.get(chunk.request_id)
            if pending is None or pending.flight is None:
                continue
            ranks.append(self._due.rank_running(pending, began))
        return bool(ranks) and self._due.rank(head) > max(ranks)

    def _seconds_ahead(self, newcomer: Pending, now: float) -> float:
        total = self._book.seconds()
        ahead = self._due.seconds_ahead(newcomer, total)
        under_way = [paused.resumed(now) for paused in self._paused]
        if self._running is not None:
            under_way.append(self._running)
        for batch, began in under_way:
            if not self._gives_way(batch, began, newcomer):
                ahead += max(0.0, self._cost.seconds(batch) - (now - began))
        return min(ahead, total)


def _ids(batch: Batch) -> set[str]:
    return {chunk.request_id for chunk in (*batch.prefills, *batch.decodes)}


POLICY = PolicyKind(
    name="flowprefill",
    summary="earliest deadline first, preempted between layers, after FlowPrefill",
    make=FlowPrefill,
    options=FlowOptions,
    settings=CONTINUOUS_SETTINGS,
)
