"""Settles batches: emits their tokens, accounts their KV, and tells the policy what they took.

A batch is enqueued, and later settled once the device has finished it. On a CPU both happen at
once. A GPU computes while the host goes on, so settling can wait:

- A batch nested in another one is settled at one of the next layer boundaries.
- A batch of its own is *dispatched*: policy and sequences go on as if it had been computed, so that
  the next batch can be decided on and enqueued while the device computes this one. Tokens that the
  next batch needs stay on the device. Then the first batch is settled.

A dispatched batch may turn out to end a request, with a stop token. The next batch then computes a
token of that request in vain. The token is dropped, and its KV never enters the prefix cache.
"""

from __future__ import annotations

from collections import deque

import torch

from pla_serve.engine.loop.batches import BatchMember, EnqueuedBatch
from pla_serve.engine.loop.faults import RequestFaults
from pla_serve.engine.loop.output import ends_with_next, failure, take_token
from pla_serve.engine.loop.parts import LoopContext
from pla_serve.engine.loop.requests import RequestTable
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.sampling import Sampled
from pla_serve.policy.protocol import Batch

MOST_NESTED = 4
"""Nested batches that may be enqueued before the first of them is settled."""


class BatchSettlement:
    """Holds the enqueued batches of one loop, and settles them in the order of the device."""

    def __init__(self, context: LoopContext, requests: RequestTable, faults: RequestFaults) -> None:
        parts = context.parts
        self._context = context
        self._policy = parts.policy
        self._kv = parts.kv
        self._exchange = parts.exchange
        self._intake = parts.intake
        self._sampler = parts.sampler
        self._requests = requests
        self._faults = faults
        self._telemetry = context.telemetry
        self._enqueued: deque[EnqueuedBatch] = deque()

    @property
    def pending(self) -> bool:
        """Whether there are batches to settle."""
        return bool(self._enqueued)

    @property
    def finished(self) -> bool:
        """Whether the device has finished all batches, so that settling them does not wait."""
        return not self._enqueued or self._enqueued[-1].ended.done()

    @property
    def dispatched(self) -> EnqueuedBatch | None:
        """Dispatched batch that is not settled. There is at most one when a batch is prepared."""
        return next((batch for batch in self._enqueued if batch.dispatched), None)

    @property
    def dispatched_tokens(self) -> torch.Tensor | None:
        """Tokens that the dispatched batch chooses, (rows,) int64 on the device.

        `Sequence.chosen_row` is a row of it.
        """
        batch = self.dispatched
        return None if batch is None or batch.choice is None else batch.choice.chosen

    def reason_to_settle(self, batch: EnqueuedBatch) -> str | None:
        """Return why a batch must be settled before another one is prepared.

        None means that it can be dispatched. The reasons are labels of a metric.
        """
        if batch.choice is None:
            return "abandoned"
        for member in batch.members:
            reason = member.sequence.sampling.needs_last_token
            if member.yields and reason is not None:
                return reason
        return None

    def settle_later(self, batch: EnqueuedBatch) -> None:
        """Keep a nested batch, to be settled at one of the next layer boundaries."""
        self._enqueued.append(batch)

    def dispatch(self, batch: EnqueuedBatch) -> None:
        """Go on as if ``batch`` had been computed, and keep it to be settled.

        `reason_to_settle` must have returned None for it.
        """
        now = self._context.clock()
        self._policy.dispatched(batch.batch, now)
        row = 0
        for member in batch.members:
            member.sequence.dispatched += member.tokens
            if not member.yields:
                continue
            if not member.sequence.over:
                with self._faults.of(member.sequence):
                    self._expect_token(member, row, now)
            row += 1
        batch.dispatched = True
        self._enqueued.append(batch)

    def settle_finished(self) -> None:
        """Settle the batches that the device has finished, and the oldest if there are many."""
        while self._enqueued and (
            len(self._enqueued) > MOST_NESTED or self._enqueued[0].ended.done()
        ):
            self.settle(self._enqueued.popleft())

    def settle_all(self, reason: str | None = None) -> None:
        """Wait for all enqueued batches and settle them.

        Args:
            reason: why that is done before another batch is enqueued, for the metric.
        """
        if reason is not None and self.dispatched is not None:
            self._telemetry.steps_waited[reason] += 1
        while self._enqueued:
            self.settle(self._enqueued.popleft())

    def resume_late(self) -> None:
        """Have sequences whose grammar was late decode again, or end if their grammar failed."""
        if not self._requests.any_late:
            return
        self._sampler.poll()
        for sequence in self._requests.take_answered():
            with self._faults.of(sequence):
                self._resume(sequence)

    def _resume(self, sequence: Sequence) -> None:
        error = sequence.sampling.grammar_error
        if sequence.sampling.ended:
            self._take(sequence, Sampled(-1, ended=True), self._context.clock())
        elif error is None:
            self._requests.decode(sequence, sequence.computed, self._context.clock())
        else:
            self._context.emit(failure(sequence, error, of_request=True))
            self._requests.end(sequence)

    def settle(self, batch: EnqueuedBatch) -> None:
        """Wait until the device has finished ``batch``, and settle it."""
        batch.ended.wait()
        for member in batch.members:
            member.sequence.in_flight -= 1
        sampled = self._read_tokens(batch)
        now = self._context.clock()
        seconds = batch.ended.seconds_since(batch.began)
        if seconds is None:
            seconds = now - batch.times.started
        self._tell_policy(batch, max(0.0, seconds - batch.times.nested_seconds), now)
        batch.outer_times.nested_seconds += seconds
        read = zip(batch.members, sampled, batch.scored, batch.pooled, strict=True)
        for member, token, scores, total in read:
            with self._faults.of(member.sequence):
                if scores is not None:
                    member.sequence.scores.append(scores)
                if total is not None:
                    member.add_pooled(total)
                self._settle_member(member, token, now, dispatched=batch.dispatched)

    def _expect_token(self, member: BatchMember, row: int, now: float) -> None:
        """Go on with a sequence whose next token only the device knows."""
        sequence = member.sequence
        sequence.chosen_row = row
        sequence.sampling.promise()
        if ends_with_next(sequence, self._intake.limits.max_model_len):
            self._policy.remove(sequence.id)
        elif not member.decodes:
            self._requests.decode(sequence, sequence.enqueued, now)

    def _read_tokens(self, batch: EnqueuedBatch) -> list[Sampled | None]:
        """Return the next token of each member, or None for members that yield none."""
        if batch.choice is None:
            return [None] * len(batch.members)
        limit = self._intake.limits.max_model_len
        yielding = [member.sequence for member in batch.members if member.yields]
        last = {
            row
            for row, sequence in enumerate(yielding)
            if sequence.sampling.grammar is not None and ends_with_next(sequence, limit)
        }
        found = iter(self._sampler.accept(batch.choice, last))
        return [next(found) if member.yields else None for member in batch.members]

    def _tell_policy(self, batch: EnqueuedBatch, seconds: float, now: float) -> None:
        """Report the time of a batch to the policy. An abandoned batch is reported as empty."""
        computed = batch.batch
        if batch.choice is None:
            computed = Batch(computed.kind)
        else:
            self._telemetry.count_batch(computed, seconds, batch.nested)
        if batch.dispatched:
            self._policy.measured(computed, seconds, now)
        else:
            self._policy.observe(computed, seconds, now)

    def _settle_member(
        self, member: BatchMember, sampled: Sampled | None, now: float, *, dispatched: bool
    ) -> None:
        """Account the KV of one member, and take its token."""
        sequence = member.sequence
        if dispatched:
            sequence.dispatched -= member.tokens
            sequence.chosen_row = None
        if sequence.over:
            if not sequence.in_flight:
                self._kv.remember(sequence.tokens, sequence.computed, sequence.table)
                self._requests.remove(sequence)
            return
        late = sampled is not None and sampled.late
        # The last token of a late one is computed again, in its own place, to have its logits.
        sequence.computed += member.tokens - late
        in_use = sequence.in_flight > 0
        self._kv.remember(sequence.tokens, sequence.computed, sequence.table, in_use=in_use)
        if sequence.request.hand_over is not None and not late:
            self._exchange.computed(sequence)
        if late:
            self._requests.sit_out(sequence)
        elif sampled is not None:
            self._take(sequence, sampled, now)
            if not sequence.over and sequence.sampling.lags:
                self._requests.sit_out(sequence)
            elif not (sequence.over or member.decodes or dispatched):
                self._requests.decode(sequence, sequence.computed, now)

    def _take(self, sequence: Sequence, sampled: Sampled, now: float) -> None:
        """Append and emit the next token of a sequence, and end it if that was the last."""
        first = sequence.made == 0
        output = take_token(sequence, sampled, self._intake.limits.max_model_len)
        self._context.emit(output)
        if sampled.error is None:
            self._telemetry.generation_tokens += not sampled.ended
            if first:
                self._telemetry.count_first(sequence, now)
                self._intake.settle_forecast(sequence, now, served=True)
        if output.finish_reason is not None:
            if output.finish_reason == "handed_over":
                self._exchange.hand_over(sequence, now)
            self._requests.end(sequence)
