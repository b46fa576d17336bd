"""The policy for an engine that builds a batch for each step.

Such an engine (vLLM) keeps its own batch building: decode steps first, then prefills, as far as
tokens and KV memory go. What is decided here, before each step, is which prefills may be in it,
in which order, and how many tokens of each.

The engine may do less than was planned (no memory, a smaller budget), and plans the next step
before it knows how the last one ended. So nothing stays in flight: what was handed out is taken
back, and what is left of it is added again with the numbers that the engine has
(`StepPlanner.settle`). Times are reported when they are known (`StepPlanner.finished`).

A step usually runs to its end. Where it can be left between two layers (``interruptible``), a step
of long work has the whole budget, and `StepPlanner.nested` says what runs inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from math import inf, nextafter
from typing import NamedTuple

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.length_aware import LengthAware
from pla_serve.policy.protocol import (
    Batch,
    BatchClass,
    Chunk,
    PrefillPolicy,
    PrefillRequest,
    Run,
    Wait,
)
from pla_serve.policy.step_length import SPARE_SHARE, StepLength
from pla_serve.policy.tuning import Tuning

MOST_PRIORITIES = 16
"""Most priorities whose policies are kept. One without prefills is kept for the traffic that it has
measured."""

MakePolicy = Callable[[PolicyConfig, CostModel], PrefillPolicy]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Prefills that one step of the engine may compute."""

    kind: BatchClass
    """Class of the prefills; ``DECODE`` if there are none."""
    chunks: tuple[Chunk, ...] = ()
    """Prefills in order, each with the most tokens that the step may compute of it."""
    priority: int = 0
    """Priority whose policy has made this plan."""
    others_tokens: int | None = None
    """Most tokens of a prefill that is not in the plan but has to run; None sets no limit."""


class _Known(NamedTuple):
    """A prefill that waits or is under way; numbers as the policy has them."""

    request: PrefillRequest
    short: bool


class StepPlanner:
    """Plans each step of an engine by a policy. Deterministic: the time is an argument.

    With several priorities there is a policy for each, and the most urgent one that has prefills
    plans the step: a strict order, as vLLM's priority scheduling is. They share the cost model.

    Args:
        config: ``interruptible`` and ``long_chunk_tokens`` are set here: chunks are cut to
            `StepLength`, not by the policy.
        most_seconds, spare_share: see `StepLength`; unused if steps can be left.
        interruptible: whether a step of long work can be left between two layers.
        layers: of the model, between which it can be left.
    """

    def __init__(
        self,
        config: PolicyConfig,
        cost: CostModel,
        *,
        most_seconds: float | None = None,
        spare_share: float = SPARE_SHARE,
        interruptible: bool = False,
        layers: int | None = None,
        make: MakePolicy = LengthAware,
    ) -> None:
        self._config = replace(
            config,
            interruptible=interruptible,
            layers=layers,
            long_chunk_tokens=config.max_batch_tokens,
        )
        self._cost = cost
        self._make = make
        self._tuning = Tuning()
        self._length = StepLength(cost, most_seconds, spare_share)
        self._policies: dict[int, PrefillPolicy] = {}
        self._known: dict[str, _Known] = {}
        self._shorts = 0
        self._outer: StepPlan | None = None
        """It planned the step under way, which can be left; None if there is no such step."""
        self._after: dict[str, tuple[int, int]] = {}
        """It has the new tokens and history of that step's prefills when it has ended, by id."""

    @property
    def known(self) -> Collection[str]:
        """Ids of the prefills that wait or are under way; a view, it follows what happens."""
        return self._known.keys()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def shorts(self) -> int:
        """Short prefills that wait or are under way."""
        return self._shorts

    @property
    def longs(self) -> int:
        """Long prefills that wait or are under way."""
        return len(self._known) - self._shorts

    def boundary(self) -> int:
        """L_m without history, in tokens."""
        given = self._config.boundary_tokens
        return self._cost.boundary(0) if given is None else given

    def add(self, request: PrefillRequest, now: float) -> None:
        """Add a prefill that has arrived."""
        self.remove(request.id)
        known = self._enter(request, now)
        if known.short:
            self._length.short_arrived(now)

    def update(self, request_id: str, new_tokens: int, history: int, now: float) -> None:
        """Change the numbers of a prefill, read again; unknown ids are ignored."""
        known = self._known.get(request_id)
        if known is None:
            return
        old = known.request
        if (old.new_tokens, old.history) == (new_tokens, history):
            return
        self.remove(request_id)
        self._enter(_again(old, new_tokens, history), now)

    def remove(self, request_id: str) -> None:
        """Forget a prefill: finished, aborted, preempted. Unknown ids are ignored."""
        known = self._known.pop(request_id, None)
        if known is None:
            return
        self._shorts -= known.short
        self._policies[known.request.priority].remove(request_id)

    def plan(self, now: float, budget: int) -> StepPlan:
        """Return the plan of the next step, of at most ``budget`` prefill tokens.

        Its prefills are in flight until `settle`, which must be the next call.
        """
        interruptible = self._config.interruptible
        step_seconds = inf if interruptible else self._length.seconds(now, self.longs)
        others = self._length.tokens(step_seconds, 0)
        for priority in sorted(self._policies):
            decision = self._policies[priority].next(now)
            if isinstance(decision, Run) and decision.batch.prefills:
                batch = decision.batch
                limit = budget
                if batch.kind is not BatchClass.SHORT and not interruptible:
                    limit = self._limit(batch.prefills[0], step_seconds, budget)
                chunks = tuple(_cut(batch.prefills, limit))
                left_out = [chunk.request_id for chunk in batch.prefills[len(chunks) :]]
                self._take_back(left_out, now)
                return StepPlan(batch.kind, chunks, priority, others)
            if isinstance(decision, Wait):
                return StepPlan(BatchClass.DECODE, (), priority, others)
        return StepPlan(BatchClass.DECODE, (), 0, others)

    def settle(self, plan: StepPlan, left: dict[str, tuple[int, int]], now: float) -> None:
        """Note which prefills the engine has put into the step.

        Args:
            left: by id, the new tokens and history that each known prefill in the step will have
                after the step; 0 new tokens if the step completes it. A planned prefill that is
                missing here is not in the step.

        A step of long work that can be left keeps its prefills as they were until it has `ended`:
        the policy sees long work under way, and shares the time between it and what runs inside.
        """
        if self._config.interruptible and plan.kind is BatchClass.LONG:
            self._take_back([chunk.request_id for chunk in plan.chunks], now)
            self._outer, self._after = plan, left
            return
        self._take_back([c.request_id for c in plan.chunks if c.request_id not in left], now)
        self._renew(left, now)

    def nested(self, now: float, running: Batch) -> StepPlan | None:
        """Return what runs at this layer boundary of the step under way; None if it goes on.

        Its shorts are in flight until `settle`, which must be the next call.

        Args:
            running: the step of long work that would be left.
        """
        outer = self._outer
        if outer is None:
            return None
        for priority in sorted(self._policies):
            if priority > outer.priority:
                break
            batch = self._policies[priority].at_layer_boundary(now, running)
            if batch is not None:
                return StepPlan(batch.kind, batch.prefills, priority)
        return None

    def token_seconds(self, streams: int, context: int) -> float:
        """Return the seconds between two decode steps of so many streams inside long work.

        They take `Tuning.token_share` of the time, as in `LengthAware`, whose streams step there.

        Args:
            context: tokens of all streams together.
        """
        step = self._cost.work_seconds(streams, context, context, streams, 1)
        return step / self._tuning.token_share

    def ended(self, plan: StepPlan, now: float) -> None:
        """Note that the step of this plan has run; needed where steps can be left."""
        if plan is self._outer:
            self._renew(self._after, now)
            self._outer, self._after = None, {}

    def _renew(self, left: dict[str, tuple[int, int]], now: float) -> None:
        """Give prefills the numbers that they have now; whole ones are forgotten."""
        for request_id, (new_tokens, history) in left.items():
            known = self._known.get(request_id)
            if known is None:
                continue
            self.remove(request_id)
            if new_tokens > 0:
                self._enter(_again(known.request, new_tokens, history), now)

    def finished(self, plan: StepPlan, batch: Batch | None, seconds: float, now: float) -> None:
        """Learn from a step that has run.

        Args:
            plan: plan of the step.
            batch: batch that the engine made of it. None: only the time is known.
            seconds: time of the step, without waiting for the step before it.
        """
        self._length.ran(now, seconds, batch is not None and batch.kind is BatchClass.LONG)
        if batch is None:
            return
        policy = self._policies.get(plan.priority)
        if policy is None:
            self._cost.observe(batch, seconds)
        else:
            policy.observe(batch, seconds, now)

    def _limit(self, first: Chunk, seconds: float, budget: int) -> int:
        """Return the most tokens of a step of long work.

        The rest of its first prefill is divided into equal steps.
        """
        tokens = self._length.tokens(seconds, first.history)
        most = max(1, budget if tokens is None else min(tokens, budget))
        whole = self._known[first.request_id].request.new_tokens
        parts = -(-whole // most)
        return most if parts == 1 else -(-whole // parts)

    def _enter(self, request: PrefillRequest, now: float) -> _Known:
        policy = self._policies.get(request.priority)
        if policy is None:
            self._drop_empty()
            policy = self._policies[request.priority] = self._make(self._config, self._cost)
        policy.add(request, now)
        short = policy.waits_as_short(request.new_tokens, request.history)
        known = self._known[request.id] = _Known(request, short)
        self._shorts += short
        return known

    def _take_back(self, request_ids: Iterable[str], now: float) -> None:
        for request_id in request_ids:
            known = self._known.get(request_id)
            if known is not None:
                self.remove(request_id)
                request = known.request
                self._enter(_again(request, request.new_tokens, request.history), now)

    def _drop_empty(self) -> None:
        """Forget priorities without prefills, so that a client cannot make ever more of them."""
        if len(self._policies) >= MOST_PRIORITIES:
            used = {known.request.priority for known in self._known.values()}
            self._policies = {key: self._policies[key] for key in self._policies if key in used}


def _again(request: PrefillRequest, new_tokens: int, history: int) -> PrefillRequest:
    """Return the request with other numbers.

    A policy takes a request for a new arrival unless it arrived before the newest request that it
    knows. So the arrival is moved back by the smallest step of a float.
    """
    arrival = nextafter(request.arrival, -inf)
    return replace(request, arrival=arrival, new_tokens=new_tokens, history=history)


def _cut(chunks: tuple[Chunk, ...], limit: int) -> list[Chunk]:
    """Return the first chunks that ``limit`` tokens hold; the last of them may be cut."""
    kept: list[Chunk] = []
    left = limit
    for chunk in chunks:
        if left <= 0:
            break
        if chunk.tokens > left:
            chunk = chunk._replace(tokens=left, completes=False)
        kept.append(chunk)
        left -= chunk.tokens
    return kept
