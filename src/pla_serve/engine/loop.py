"""The engine's loop: takes requests, runs what the policy decides, emits tokens.

A batch can be left at each layer boundary. There the loop takes what has arrived and asks the
policy whether something goes first; that batch runs to its end, and the outer one goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from pla_serve.engine.executor import Executed, PlainExecutor
from pla_serve.engine.flight import Flight, Frame, Member
from pla_serve.engine.forward import SpanRequest
from pla_serve.engine.messages import (
    AbortRequest,
    Accepted,
    AddRequest,
    Inbound,
    Lend,
    Outbound,
    Rejected,
    Reserve,
)
from pla_serve.engine.output import take_token
from pla_serve.engine.parts import Parts
from pla_serve.engine.sampling import Choice, Sampled
from pla_serve.engine.sequence import Sequence
from pla_serve.engine.telemetry import Telemetry
from pla_serve.engine.transfer.protocol import TransferMessage, receive
from pla_serve.policy.protocol import Batch, Chunk, Idle, Wait

REFRESH = 8
"""Waiting requests whose cached prefix is looked up again in one step, if the cache changed."""
MOST_FLIGHTS = 4
"""Express batches that the device may have before it has finished the first of them."""


class _Abandoned(Exception):
    """Everyone in the running batch was aborted."""


class EngineLoop:
    """Single-threaded; ``step`` is called again and again.

    Args:
        inbox: messages that have arrived since it was called last; never blocks.
        emit: takes messages as they are made, also in the middle of a batch.
        clock: seconds, monotonic, the clock of `AddRequest.arrival`.
    """

    def __init__(
        self,
        parts: Parts,
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
        self._sequences: dict[str, Sequence] = {}
        self._unstarted: dict[str, Sequence] = {}
        """Wait for their first chunk; in the order in which their prefix is looked up again."""
        self._telemetry = Telemetry()
        self._executor = parts.executor or PlainExecutor(
            parts.runner, parts.kv.block_tokens, parts.device
        )
        self._device = self._executor.device
        self._frame = Frame(0.0)
        """Of the running batch; one of no account if there is none."""
        self._flights: deque[Flight] = deque()
        """Express batches that the device may not have finished, oldest first."""
        self._preempted: set[str] = set()
        """Who lost its memory while the batch at hand was prepared."""
        self._idle_blocks: int | None = None
        """Free KV blocks, as reported since there is nothing to do; None while there is."""

    def step(self) -> float | None:
        """Run at most one batch, and what goes before it at its layer boundaries.

        Returns how long the loop may be left alone: 0 if there is more to do, some seconds, or
        None until a message comes.
        """
        self._take_inbox()
        self._unpark()
        self._refresh_unstarted()
        decision = self._policy.next(self._clock())
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
        self._sequences[request.id] = sequence
        self._unstarted[request.id] = sequence
        self._emit(Accepted(request.id, numbers.history))
        self._policy.add(numbers, now)

    def _taken_id(self, request_id: str) -> Rejected | None:
        if request_id not in self._sequences:
            return None
        reason = f"request {request_id} runs already; ids must be unique"
        return Rejected(id=request_id, reason=reason, retry_after=None)

    def _abort(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            self._exchange.release(request_id)
        else:
            sequence.aborted = True
            self._exchange.abandon(sequence)
            self._parts.intake.settle(sequence, self._clock(), served=False)
            self._policy.remove(request_id)
            if not sequence.in_flight:
                self._discard(sequence)

    def _discard(self, sequence: Sequence) -> None:
        """Nothing of it is left but what the prefix cache keeps."""
        del self._sequences[sequence.id]
        self._unstarted.pop(sequence.id, None)
        self._exchange.withdraw(sequence)
        self._parts.gate.release(sequence)

    # KV from and for other engines

    def _exchange_message(self, message: TransferMessage) -> None:
        fresh = isinstance(message, (Reserve, Lend))
        refusal = self._taken_id(message.id) if fresh else None
        if refusal is not None:
            self._emit(refusal)
            return
        answer, sequence = receive(self._exchange, message, self._clock())
        if sequence is not None:
            self._sequences[sequence.id] = sequence
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
                self._discard(sequence)
                continue
            self._kv.remember(sequence.tokens, sequence.computed, sequence.table)
            if not sequence.table.blocks:
                self._unstarted[sequence.id] = sequence
                self._policy.add(sequence.prefill(self._look_up(sequence)), now)
            elif sequence.generated and sequence.computed == len(sequence.tokens) - 1:
                arrival = sequence.request.arrival
                self._policy.start_decode(sequence.id, sequence.computed, arrival, now)
            else:
                self._policy.add(sequence.prefill(sequence.computed), now)

    # Memory

    def _unpark(self) -> None:
        if not len(self._parts.gate):
            return
        now = self._clock()
        for sequence in self._parts.gate.unpark(now):
            self._policy.add(sequence.prefill(sequence.computed), now)

    def _refresh_unstarted(self) -> None:
        """Tell the policy what has become cached, or been evicted, while requests wait."""
        version = self._kv.version
        for _ in range(min(REFRESH, len(self._unstarted))):
            request_id, sequence = next(iter(self._unstarted.items()))
            if sequence.seen_version == version:
                return
            del self._unstarted[request_id]
            self._unstarted[request_id] = sequence
            told = sequence.seen_cached
            if self._look_up(sequence) != told:
                self._policy.add(sequence.prefill(sequence.seen_cached), self._clock())

    def _look_up(self, sequence: Sequence) -> int:
        """How much of it is cached now."""
        sequence.seen_version = self._kv.version
        sequence.seen_cached = self._kv.cached_prefix(sequence.tokens)
        return sequence.seen_cached

    def _preempt(self, sequence: Sequence) -> None:
        """Take its memory; it is prefilled again, output so far included, when there is some."""
        self._telemetry.recompute_preemptions += 1
        self._preempted.add(sequence.id)
        self._policy.remove(sequence.id)
        self._exchange.withdraw(sequence)
        self._parts.gate.release(sequence)
        sequence.computed = 0
        self._unstarted[sequence.id] = sequence
        self._policy.add(sequence.prefill(self._look_up(sequence)), self._clock())

    # Batches

    def _run(self, batch: Batch, nested: bool = False) -> bool:
        """Compute what of ``batch`` memory allows; False if that is nothing."""
        batch, members = self._prepare(batch)
        if not members:
            return False
        outer, self._frame = self._frame, Frame(self._clock())
        began = self._device.record()
        whole = False
        choice: Choice | None = None
        try:
            executed = self._forward(batch, members, nested)
            whole, choice = executed.whole, self._choose(members, executed.logits)
        except _Abandoned:
            pass
        finally:
            frame, self._frame = self._frame, outer
        ended = self._device.record()
        flight = Flight(batch, members, choice, frame, outer, nested, began, ended)
        if nested and whole and self._device.asynchronous:
            # The device computes on while the host enqueues the next layer of the outer batch.
            self._flights.append(flight)
            self._land_done()
        else:
            self._land_all()
            self._land(flight)
        return True

    def _land_done(self) -> None:
        """Book the express batches that the device has finished, and the oldest if many are out."""
        while self._flights and (
            len(self._flights) > MOST_FLIGHTS or self._flights[0].ended.done()
        ):
            self._land(self._flights.popleft())

    def _land_all(self) -> None:
        while self._flights:
            self._land(self._flights.popleft())

    def _land(self, flight: Flight) -> None:
        """Wait for a batch and book what came of it."""
        if not (flight.nested or flight.ended.done()):
            # The device computes: a good time for what has to be done before the next batch.
            self._take_inbox()
            self._refresh_unstarted()
        flight.ended.wait()
        members, batch = flight.members, flight.batch
        for member in members:
            member.sequence.in_flight = False
        sampled = self._accept(members, flight.choice)
        now = self._clock()
        seconds = now - flight.frame.started
        if flight.nested:
            seconds = flight.ended.seconds_since(flight.began) or seconds
        if flight.choice is not None:
            self._telemetry.count_batch(batch, flight.nested)
        else:
            batch = Batch(batch.kind)
        self._policy.observe(batch, max(0.0, seconds - flight.frame.inside), now)
        flight.outer.inside += seconds
        for member, token in zip(members, sampled, strict=True):
            self._advance(member, token, now)

    def _prepare(self, batch: Batch) -> tuple[Batch, list[Member]]:
        """The part of ``batch`` that can run now; the rest goes back to the policy."""
        lost = self._preempted
        lost.clear()
        decodes = tuple(c for c in batch.decodes if self._ready_to_decode(c))
        # The growth of one decode may have taken the memory of others in this batch.
        decodes = tuple(c for c in decodes if c.request_id not in lost)
        prefills = tuple(c for c in batch.prefills if self._ready_to_prefill(c))
        members = [
            Member(self._sequences[chunk.request_id], chunk.tokens, False, chunk.completes)
            for chunk in prefills
        ] + [Member(self._sequences[chunk.request_id], 1, True, True) for chunk in decodes]
        for member in members:
            member.sequence.in_flight = True
        return replace(batch, prefills=prefills, decodes=decodes), members

    def _ready_to_prefill(self, chunk: Chunk) -> bool:
        if chunk.request_id in self._preempted:
            return False
        sequence = self._sequences[chunk.request_id]
        now = self._clock()
        if not sequence.table.blocks:
            self._unstarted.pop(sequence.id, None)
            left = len(sequence.tokens) - chunk.history
            short = self._policy.waits_as_short(left, chunk.history)
            if not self._parts.gate.reserve(sequence, short, left, now):
                self._policy.remove(sequence.id)
                return False
        if sequence.computed != chunk.history:
            # The cache has changed since the policy was told: let it decide on the true numbers.
            self._policy.remove(sequence.id)
            self._policy.add(sequence.prefill(sequence.computed), now)
            return False
        if sequence.started is None:
            if sequence.request.hand_over is not None:
                self._emit(self._exchange.offer(sequence))
            sequence.started = now
            self._telemetry.count_lookup(sequence)
        return True

    def _ready_to_decode(self, chunk: Chunk) -> bool:
        if chunk.request_id in self._preempted:
            return False
        sequence = self._sequences[chunk.request_id]
        while not self._kv.grow(sequence.table, len(sequence.tokens)):
            victim = self._parts.gate.victim(sequence)
            self._preempt(victim if victim is not None else sequence)
            if victim is None:
                return False
        return True

    def _forward(self, batch: Batch, members: list[Member], nested: bool) -> Executed:
        spans = [
            SpanRequest(
                tokens=m.sequence.tokens[m.sequence.computed : m.sequence.computed + m.tokens],
                history=m.sequence.computed,
                runs=m.sequence.table.runs(),
                wants_logits=m.yields,
            )
            for m in members
        ]

        handing_over = [
            (m.sequence, m.sequence.computed + m.tokens)
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
                self._land_done()
                if all(member.sequence.aborted for member in members):
                    raise _Abandoned
                self._unpark()
                self._report_if_due()
                express = self._policy.at_layer_boundary(self._clock(), batch)
                if express is None or not self._run(express, nested=True):
                    return

        return self._executor.forward(spans, at_boundary)

    def _choose(self, members: list[Member], logits: torch.Tensor) -> Choice:
        """Enqueue the choice of the next token of each member that yields one."""
        yielding = [member.sequence.sampling for member in members if member.yields]
        return self._parts.sampler.choose(logits, yielding)

    def _accept(self, members: list[Member], choice: Choice | None) -> list[Sampled | None]:
        """The next token of each member that yields one."""
        if choice is None:
            return [None] * len(members)
        found = iter(self._parts.sampler.accept(choice))
        return [next(found) if member.yields else None for member in members]

    def _advance(self, member: Member, sampled: Sampled | None, now: float) -> None:
        """Book what a batch did for one of its members."""
        sequence = member.sequence
        if sequence.aborted:
            self._discard(sequence)
            return
        sequence.computed += member.tokens
        self._kv.remember(sequence.tokens, sequence.computed, sequence.table)
        if sequence.request.hand_over is not None:
            self._exchange.computed(sequence)
        if sampled is None:
            return
        first = sequence.made == 0
        output = take_token(sequence, sampled, self._parts.intake.limits.max_model_len)
        self._emit(output)
        if sampled.error is None:
            self._telemetry.generation_tokens += 1
            if first:
                self._telemetry.count_first(sequence, now)
                self._parts.intake.settle(sequence, now, served=True)
        if output.finish_reason is not None:
            self._policy.remove(sequence.id)
            if output.finish_reason == "handed_over":
                self._exchange.hand_over(sequence, now)
            self._discard(sequence)
        elif not member.decodes:
            arrival = sequence.request.arrival
            self._policy.start_decode(sequence.id, sequence.computed, arrival, now)

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
