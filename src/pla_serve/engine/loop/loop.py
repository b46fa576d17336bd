"""The engine's loop: takes requests, runs what the policy decides, emits tokens.

A batch can be left at each layer boundary. There the loop takes what has arrived and asks the
policy whether something goes first; that batch runs to its end, and the outer one goes on.

On a device that works by itself the loop is one batch ahead: it asks the policy for the next one,
and enqueues it, before it waits for the one that runs. See `booking`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.loop.parts import EngineParts
from pla_serve.engine.loop.prepare import Preparation
from pla_serve.engine.loop.requests import RequestTable
from pla_serve.engine.loop.running import BatchMember, BatchTimes, EnqueuedBatch
from pla_serve.engine.loop.settle import Booking
from pla_serve.engine.loop.telemetry import Telemetry
from pla_serve.engine.run.executor import Executed
from pla_serve.engine.sampling import TokenChoice
from pla_serve.engine.transfer.protocol import TransferMessage, receive
from pla_serve.policy.protocol import Batch, Idle, Run, Wait
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    Inbound,
    Lend,
    Outbound,
    Rejected,
    Reserve,
)


class _Abandoned(Exception):
    """Everyone in the running batch is over."""


class EngineLoop:
    """Single-threaded; ``step`` is called again and again.

    Args:
        inbox: messages that have arrived since it was called last; never blocks.
        emit: takes messages as they are made, also in the middle of a batch.
        clock: seconds, monotonic, the clock of `AddRequest.arrival`.
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
        self._kv = parts.kv
        self._exchange = parts.exchange
        self._inbox = inbox
        self._emit = emit
        self._clock = clock
        self._executor = parts.executor
        self._device = self._executor.device
        self._goes_ahead = (
            parts.async_scheduling and self._device.asynchronous and self._executor.carries
        )
        self._telemetry = Telemetry()
        self._roster = RequestTable(parts, self._telemetry, clock)
        self._booking = Booking(parts, self._roster, self._telemetry, emit=emit, clock=clock)
        self._preparation = Preparation(
            parts, self._roster, self._booking, self._telemetry, emit=emit, clock=clock
        )
        self._frame = BatchTimes(0.0)
        """Of the running batch; one of no account if there is none."""
        self._idle_blocks: int | None = None
        """Free KV blocks, as reported since there is nothing to do; None while there is."""

    def step(self) -> float | None:
        """Run at most one batch, and what goes before it at its layer boundaries.

        Returns how long the loop may be left alone: 0 if there is more to do, some seconds, or
        None until a message comes.
        """
        self._take_inbox()
        self._unpark()
        self._roster.refresh()
        self._make_way_for_longs()
        decision = self._policy.next(self._clock())
        if self._booking.under_way and not isinstance(decision, Run):
            # How the batch that runs ends may change the decision.
            self._land_all("nothing")
            return 0.0
        if isinstance(decision, Idle):
            # What is kept for other instances comes free after the last request has ended.
            if self._idle_blocks != self._kv.available:
                self._report()
                self._idle_blocks = self._kv.available
            return 0.0 if self._executor.use_idle_time() else self._exchange.pause(self._clock())
        self._idle_blocks = None
        if isinstance(decision, Wait):
            now = self._clock()
            pause = self._exchange.pause(now)
            left = max(0.0, decision.until - now)
            return left if pause is None else min(left, pause)
        self._run(decision.batch)
        self._report_if_due()
        return 0.0

    # Requests in, and out before their time

    def _take_inbox(self) -> None:
        for message in self._inbox():
            if isinstance(message, AbortRequest):
                self._abort(message.id)
            elif isinstance(message, AddRequest):
                self._add(message)
            else:
                self._exchange_message(message)
        self._take_arrivals()

    def _add(self, request: AddRequest) -> None:
        refusal = self._taken_id(request.id) or self._exchange.refuses(request)
        if refusal is not None:
            self._emit(refusal)
            return
        now = self._clock()
        admitted = self._parts.intake.admit(request, now)
        if isinstance(admitted, Rejected):
            self._emit(admitted)
            return
        sequence, numbers = admitted
        self._roster.enter(sequence)
        self._roster.await_start(sequence)
        self._emit(Accepted(request.id, numbers.history))
        self._policy.add(numbers, now)

    def _taken_id(self, request_id: str) -> Rejected | None:
        if self._roster.get(request_id) is None:
            return None
        reason = f"request {request_id} runs already; ids must be unique"
        return Rejected(id=request_id, reason=reason, retry_after=None)

    def _abort(self, request_id: str) -> None:
        sequence = self._roster.get(request_id)
        if sequence is None:
            self._exchange.release(request_id)
        elif not sequence.over:
            self._exchange.abandon(sequence)
            self._parts.intake.settle(sequence, self._clock(), served=False)
            self._roster.end(sequence)

    # KV from and for other engines

    def _exchange_message(self, message: TransferMessage) -> None:
        fresh = isinstance(message, (Reserve, Lend))
        refusal = self._taken_id(message.id) if fresh else None
        if refusal is not None:
            self._emit(refusal)
            return
        answer, sequence = receive(self._exchange, message, self._clock())
        if sequence is not None:
            self._roster.enter(sequence)
        if answer is not None:
            self._emit(answer)

    def _take_arrivals(self) -> None:
        """Go on with what other engines have begun."""
        if not self._exchange.pending:
            return
        now = self._clock()
        for sequence, end in self._exchange.poll(now):
            if end is not None:
                self._emit(end)
                self._roster.discard(sequence)
                continue
            self._kv.remember(sequence.tokens, sequence.computed, sequence.table)
            if not sequence.table.blocks:
                self._roster.await_start(sequence)
                self._policy.add(sequence.prefill(self._roster.look_up(sequence)), now)
            elif sequence.generated and sequence.computed == len(sequence.tokens) - 1:
                arrival = sequence.request.arrival
                self._policy.start_decode(sequence.id, sequence.computed, arrival, now)
            else:
                self._policy.add(sequence.prefill(sequence.computed), now)

    def _unpark(self) -> None:
        """Whoever waited for memory and has it now."""
        if not len(self._parts.gate):
            return
        now = self._clock()
        for sequence in self._parts.gate.unpark(now):
            self._policy.add(sequence.prefill(sequence.computed), now)

    # Batches

    def _run(self, batch: Batch, nested: bool = False) -> bool:
        """Compute what of ``batch`` memory allows; False if that is nothing."""
        batch, members = self._preparation.prepare(batch)
        if not members:
            return False
        if self._booking.dispatched is not None:
            self._telemetry.steps_ahead += 1
        outer, self._frame = self._frame, BatchTimes(self._clock())
        began = self._device.record()
        whole = False
        choice: TokenChoice | None = None
        try:
            executed = self._forward(batch, members)
            whole, choice = executed.whole, self._choose(members, executed)
        except _Abandoned:
            pass
        finally:
            frame, self._frame = self._frame, outer
        ended = self._device.record()
        flight = EnqueuedBatch(
            batch=batch,
            members=members,
            choice=choice,
            frame=frame,
            outer=outer,
            nested=nested,
            whole=whole,
            began=began,
            ended=ended,
        )
        if not nested:
            self._follow(flight)
        elif whole and self._device.asynchronous:
            # The device computes on while the host enqueues the next layer of the outer batch.
            self._booking.keep(flight)
            self._booking.land_done()
        else:
            self._booking.land_all()
            self._booking.land(flight)
        return True

    def _follow(self, flight: EnqueuedBatch) -> None:
        """A batch of its own is enqueued: book those before it, and this one or go ahead of it."""
        self._land_all()
        if not self._goes_ahead:
            self._land(flight)
            return
        reason = self._booking.waits_for(flight)
        if reason is None:
            self._booking.dispatch(flight)
        else:
            self._telemetry.steps_waited[reason] += 1
            self._land(flight)

    def _make_way_for_longs(self) -> None:
        """Nothing long is decided on while a whole batch is before the device: what is short and
        comes meanwhile would find itself behind it."""
        flight = self._booking.dispatched
        if flight is None or not flight.whole or flight.ended.done():
            return
        if self._policy.state(self._clock()).long_requests:
            self._land_all("long")

    def _land_all(self, reason: str | None = None) -> None:
        if not self._booking.finished:
            self._use_wait()
        self._booking.land_all(reason)

    def _land(self, flight: EnqueuedBatch) -> None:
        if not flight.ended.done():
            self._use_wait()
        self._booking.land(flight)

    def _use_wait(self) -> None:
        """The device computes: a good time for what has to be done before the next batch."""
        self._take_inbox()
        self._roster.refresh()

    def _forward(self, batch: Batch, members: list[BatchMember]) -> Executed:
        spans = [_span(member) for member in members]
        coming = self._booking.coming if any(s.carried is not None for s in spans) else None
        handing_over = [
            (m.sequence, m.sequence.enqueued + m.tokens)
            for m in members
            if m.sequence.request.hand_over is not None
        ]
        layers = 0

        def at_boundary() -> None:
            nonlocal layers
            if layers and handing_over:
                self._exchange.layers_computed(handing_over, layers)
            layers += 1
            while True:
                self._take_inbox()
                self._booking.land_done()
                if all(member.sequence.over for member in members):
                    raise _Abandoned
                self._unpark()
                self._report_if_due()
                if self._booking.dispatched is not None:
                    return  # the batch before this one still runs: nothing could go first
                express = self._policy.at_layer_boundary(self._clock(), batch)
                if express is None or not self._run(express, nested=True):
                    return

        return self._executor.forward(spans, at_boundary, coming)

    def _choose(self, members: list[BatchMember], executed: Executed) -> TokenChoice:
        """Enqueue the choice of the next token of each member that yields one."""
        yielding = [member.sequence.sampling for member in members if member.yields]
        return self._parts.sampler.choose(executed.logits, yielding)

    # Reports

    def _report_if_due(self) -> None:
        if self._telemetry.due(self._clock()):
            self._report()

    def _report(self) -> None:
        now = self._clock()
        self._emit(
            self._telemetry.report(
                now,
                queue=self._policy.state(now),
                kv=self._kv,
                parked=len(self._parts.gate),
                cost=self._parts.cost,
                waits=self._parts.intake.calibration,
                transfer=self._exchange.stats(),
                graphs=self._executor.counts(),
            )
        )


def _span(member: BatchMember) -> SpanRequest:
    sequence = member.sequence
    start = sequence.enqueued
    tokens = sequence.tokens[start : start + member.tokens]
    carried = None
    if len(tokens) < member.tokens:
        tokens, carried = [0], sequence.coming
        assert carried is not None
    return SpanRequest(
        tokens=tokens,
        history=start,
        runs=sequence.table.runs(),
        wants_logits=member.yields,
        carried=carried,
    )
