"""The engine's loop: takes requests, runs the batches that the policy decides on, emits tokens.

One step asks the policy for a batch and runs it. A long batch runs layer by layer, and at each
layer boundary the loop takes messages and asks the policy whether something goes first. Such a
nested batch runs to its end, and then the outer batch goes on::

    step                 messages -> policy.next -> prepare -> forward ------------> settle
    layer boundary                                             | messages
                                                               | policy.at_layer_boundary
                                                               | prepare -> forward -> settle

Four objects share the work: `RequestInbox` turns messages into requests, `RequestTable` knows the
state of each request, `BatchPreparation` gives batches their KV memory, and `BatchSettlement` emits
tokens. On a GPU the loop is one batch ahead: see `pla_serve.engine.loop.settle`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pla_serve.engine.loop.batches import BatchMember, BatchTimes, EnqueuedBatch
from pla_serve.engine.loop.faults import RequestFaults
from pla_serve.engine.loop.inbox import RequestInbox
from pla_serve.engine.loop.parts import EngineParts, LoopContext
from pla_serve.engine.loop.prepare import BatchPreparation
from pla_serve.engine.loop.reports import EngineReports
from pla_serve.engine.loop.requests import RequestTable
from pla_serve.engine.loop.settle import BatchSettlement
from pla_serve.engine.loop.telemetry import Telemetry
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.run.executor import Executed
from pla_serve.engine.run.pooling import HiddenSum
from pla_serve.engine.run.runner import PassAbandoned
from pla_serve.engine.run.scoring import ScoredTokens
from pla_serve.engine.sampling import TokenChoice
from pla_serve.policy.protocol import Batch, Idle, Run, Wait
from pla_serve.wire.engine import Inbound, Outbound

GRAMMAR_POLL_SECONDS = 0.001
"""Time between two looks at late grammars, while there is nothing to compute."""


class EngineLoop:
    """Serves requests in one thread, by calls of `step`.

    Args:
        inbox: returns the messages that have arrived since its last call. Never blocks.
        emit: takes messages as they are made, also in the middle of a batch.
        clock: monotonic seconds, the clock of `AddRequest.arrival`.
    """

    def __init__(
        self,
        parts: EngineParts,
        *,
        inbox: Callable[[], Iterable[Inbound]],
        emit: Callable[[Outbound], None],
        clock: Callable[[], float],
    ) -> None:
        self._parts = parts
        self._policy = parts.policy
        self._executor = parts.executor
        self._device = parts.executor.device
        self._clock = clock
        self._telemetry = Telemetry()
        context = LoopContext(parts, emit, clock, self._telemetry)
        self._requests = RequestTable(context)
        self._faults = faults = RequestFaults(context, self._requests)
        self._inbox = RequestInbox(context, self._requests, faults, inbox)
        self._settlement = BatchSettlement(context, self._requests, faults)
        self._preparation = BatchPreparation(context, self._requests, self._settlement, faults)
        self._reports = EngineReports(context)
        self._times = BatchTimes(0.0)
        """Times of the batch that is being enqueued. Between batches nobody reads them."""

    def step(self) -> float | None:
        """Run at most one batch of the policy's choice, and what goes before it inside it.

        Returns how long the loop may be left alone: 0 if there is more to do, some seconds, or
        None until a message comes.
        """
        self._inbox.take()
        self._requests.resume_parked()
        self._settlement.resume_late()
        self._requests.refresh()
        self._settle_before_long()
        decision = self._policy.next(self._clock())
        if self._settlement.pending and not isinstance(decision, Run):
            # What the running batch brings may change the decision.
            self._settle_all("nothing")
            return 0.0
        if isinstance(decision, Idle):
            return self._idle()
        self._reports.end_idle()
        if isinstance(decision, Wait):
            return self._pause_until(decision.until)
        self._run(decision.batch)
        self._reports.send_if_due()
        return 0.0

    def _idle(self) -> float | None:
        """Report that there is nothing to do, and use the time."""
        self._reports.send_idle()
        if self._executor.use_idle_time():
            return 0.0
        if self._recalibrate():
            return 0.0
        return self._pause(self._clock())

    def _recalibrate(self) -> bool:
        """Run a batch of a warm-up that is left to do. Returns False if there is none."""
        recalibration = self._parts.recalibration
        if not recalibration.active or self._has_requests():
            return False
        if not recalibration.step(self._has_requests):
            self._reports.send()
        return True

    def _has_requests(self) -> bool:
        """Take messages, and return whether there are requests now."""
        self._inbox.take()
        return len(self._requests) > 0

    def _pause(self, now: float) -> float | None:
        """Return the seconds until KV transfer or late grammars want to be asked again."""
        pause = self._parts.exchange.pause(now)
        if not self._requests.any_late:
            return pause
        return GRAMMAR_POLL_SECONDS if pause is None else min(pause, GRAMMAR_POLL_SECONDS)

    def _pause_until(self, until: float) -> float:
        """Return the seconds until the policy, or someone else, wants to be asked again."""
        now = self._clock()
        pause = self._pause(now)
        left = max(0.0, until - now)
        return left if pause is None else min(left, pause)

    # Running batches

    def _run(self, batch: Batch, *, nested: bool = False) -> bool:
        """Run the part of ``batch`` that has its KV memory. Returns False if there is none."""
        batch, members = self._preparation.prepare(batch)
        if not members:
            return False
        if self._settlement.dispatched is not None:
            self._telemetry.steps_ahead += 1
        enqueued = self._enqueue(batch, members, nested)
        if nested:
            self._finish_nested(enqueued)
        else:
            self._finish(enqueued)
        return True

    def _enqueue(self, batch: Batch, members: list[BatchMember], nested: bool) -> EnqueuedBatch:
        """Enqueue the forward pass and the choice of tokens. On a CPU that computes them.

        A batch whose requests were all aborted is abandoned at a layer boundary: it has no choice.
        """
        outer_times, self._times = self._times, BatchTimes(self._clock())
        began = self._device.record()
        whole, choice = False, None
        scored: list[ScoredTokens | None] = [None] * len(members)
        pooled: list[HiddenSum | None] = [None] * len(members)
        try:
            executed = self._forward(batch, members)
            whole, choice = executed.whole, self._choose_tokens(members, executed)
            if executed.scoring is not None:
                scored = list(executed.scoring.scored)
                self._times.nested_seconds += executed.scoring.seconds
            if executed.pooled is not None:
                pooled = list(executed.pooled)
        except PassAbandoned:
            pass
        finally:
            times, self._times = self._times, outer_times
        return EnqueuedBatch(
            batch=batch,
            members=members,
            choice=choice,
            scored=scored,
            pooled=pooled,
            times=times,
            outer_times=outer_times,
            nested=nested,
            whole=whole,
            began=began,
            ended=self._device.record(),
        )

    def _forward(self, batch: Batch, members: list[BatchMember]) -> Executed:
        spans = [member.span for member in members]
        carries = any(span.carried is not None for span in spans)
        carried = self._settlement.dispatched_tokens if carries else None
        handing_over = [
            (member.sequence, member.sequence.enqueued + member.tokens)
            for member in members
            if member.sequence.request.hand_over is not None
        ]
        layers = 0

        def at_boundary() -> None:
            nonlocal layers
            if layers and handing_over:
                self._publish(handing_over, layers)
            layers += 1
            self._at_layer_boundary(batch, members)

        return self._executor.forward(spans, at_boundary, carried)

    def _publish(self, handing_over: list[tuple[Sequence, int]], layers: int) -> None:
        """Tell other engines how many layers have the KV of these sequences' first tokens."""
        for sequence, tokens in handing_over:
            with self._faults.of(sequence):
                self._parts.exchange.layers_computed([(sequence, tokens)], layers)

    def _at_layer_boundary(self, batch: Batch, members: list[BatchMember]) -> None:
        """Take messages, and run what the policy puts before the next layer of ``batch``.

        Raises:
            PassAbandoned: all requests of the batch have been aborted.
        """
        while True:
            self._inbox.take()
            self._settlement.settle_finished()
            if all(member.sequence.over for member in members):
                raise PassAbandoned
            self._requests.resume_parked()
            self._settlement.resume_late()
            self._reports.send_if_due()
            if self._settlement.dispatched is not None:
                return  # the batch before this one still runs: nothing could go first
            express = self._policy.at_layer_boundary(self._clock(), batch)
            if express is None or not self._run(express, nested=True):
                return

    def _choose_tokens(self, members: list[BatchMember], executed: Executed) -> TokenChoice:
        yielding = [member.sequence.sampling for member in members if member.yields]
        return self._parts.sampler.choose(executed.logits, yielding)

    # Settling batches, or going ahead of the device

    def _finish(self, batch: EnqueuedBatch) -> None:
        """Settle the batches before ``batch``, and dispatch it, or settle it as well."""
        self._settle_all()
        reason = None
        if self._schedules_ahead:
            reason = self._settlement.reason_to_settle(batch)
            if reason is None:
                self._settlement.dispatch(batch)
                return
            self._telemetry.steps_waited[reason] += 1
        if not batch.ended.done():
            self._use_wait()
        self._settlement.settle(batch)

    def _finish_nested(self, batch: EnqueuedBatch) -> None:
        """Settle a nested batch, unless the device still computes all of it.

        The host then goes on to enqueue the next layer of the outer batch.
        """
        if batch.whole and self._device.asynchronous:
            self._settlement.settle_later(batch)
            self._settlement.settle_finished()
        else:
            self._settlement.settle_all()
            self._settlement.settle(batch)

    @property
    def _schedules_ahead(self) -> bool:
        """Whether the next batch is decided on while the device computes this one."""
        return self._parts.async_scheduling and self._device.asynchronous and self._executor.carries

    def _settle_before_long(self) -> None:
        """Settle a dispatched batch that runs without layer boundaries, if long prefills wait.

        A long batch enqueued behind it could not be left before that batch has ended, so shorts
        that arrive meanwhile would wait longer.
        """
        batch = self._settlement.dispatched
        if batch is None or not batch.whole or batch.ended.done():
            return
        if self._policy.state(self._clock()).long_requests:
            self._settle_all("long")

    def _settle_all(self, reason: str | None = None) -> None:
        """See `BatchSettlement.settle_all`."""
        if not self._settlement.finished:
            self._use_wait()
        self._settlement.settle_all(reason)

    def _use_wait(self) -> None:
        """Do what has to be done before the next batch anyway, while the device computes."""
        self._inbox.take()
        self._requests.refresh()
