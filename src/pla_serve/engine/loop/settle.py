"""What becomes of batches whose work is enqueued: tokens, KV, and what the policy hears.

A batch is *booked* when the device has finished it. On a device that works by itself that can wait:

- An express batch inside another one is booked at one of the next layer boundaries.
- A batch of its own is *dispatched*: policy and sequences go on as if it had been computed, so that
  the next one can be decided on and enqueued, with the tokens that it needs still on the device.
  Then the first is booked. One whose end turns out to have been the end of a request has its token
  in the second batch for nothing; that token is dropped, and its KV never gets to be known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from pla_serve.engine.loop.output import ends_with_next, take_token
from pla_serve.engine.loop.parts import EngineParts
from pla_serve.engine.loop.requests import RequestTable
from pla_serve.engine.loop.running import BatchMember, EnqueuedBatch
from pla_serve.engine.loop.telemetry import Telemetry
from pla_serve.engine.sampling import Sampled, TokenChoice
from pla_serve.policy.protocol import Batch
from pla_serve.wire.engine import Outbound

MOST_NESTED = 4
"""Express batches that the device may have before it has finished the first of them."""


class Booking:
    """Books the batches of one loop, in the order in which they were enqueued."""

    def __init__(
        self,
        parts: EngineParts,
        roster: RequestTable,
        telemetry: Telemetry,
        *,
        emit: Callable[[Outbound], None],
        clock: Callable[[], float],
    ) -> None:
        self._policy = parts.policy
        self._kv = parts.kv
        self._exchange = parts.exchange
        self._sampler = parts.sampler
        self._intake = parts.intake
        self._roster = roster
        self._telemetry = telemetry
        self._emit = emit
        self._clock = clock
        self._flights: deque[EnqueuedBatch] = deque()

    @property
    def under_way(self) -> bool:
        """Batches are out that the device may not have finished."""
        return bool(self._flights)

    @property
    def finished(self) -> bool:
        """The device has done all that is out."""
        return not self._flights or self._flights[-1].ended.done()

    @property
    def dispatched(self) -> EnqueuedBatch | None:
        """The dispatched batch that is not booked yet; there is at most one when another batch is
        prepared."""
        return next((flight for flight in self._flights if flight.dispatched), None)

    @property
    def coming(self) -> torch.Tensor | None:
        """Tokens that the dispatched batch chooses; `Sequence.coming` names rows of it."""
        flight = self.dispatched
        return None if flight is None or flight.choice is None else flight.choice.chosen

    def waits_for(self, flight: EnqueuedBatch) -> str | None:
        """Why a batch has to be booked before another one is prepared; None if it can be
        dispatched."""
        if flight.choice is None:
            return "abandoned"
        for member in flight.members:
            reason = member.sequence.sampling.needs_last_token
            if member.yields and reason is not None:
                return reason
        return None

    def keep(self, flight: EnqueuedBatch) -> None:
        """Book an express batch at one of the next boundaries."""
        self._flights.append(flight)

    def dispatch(self, flight: EnqueuedBatch) -> None:
        """Go on from the end of a batch of which `waits_for` knows of nothing to wait for."""
        now = self._clock()
        self._policy.dispatched(flight.batch, now)
        row = 0
        for member in flight.members:
            sequence = member.sequence
            sequence.ahead += member.tokens
            if not member.yields:
                continue
            if not sequence.over:
                self._promise(member, row, now)
            row += 1
        flight.dispatched = True
        self._flights.append(flight)

    def land_done(self) -> None:
        """Book the batches that the device has finished, and the oldest if many are out."""
        while self._flights and (len(self._flights) > MOST_NESTED or self._flights[0].ended.done()):
            self.land(self._flights.popleft())

    def land_all(self, reason: str | None = None) -> None:
        """Wait for everything that is out, and book it.

        Args:
            reason: why that is done before another batch is enqueued behind it; for metrics.
        """
        if reason is not None and self.dispatched is not None:
            self._telemetry.steps_waited[reason] += 1
        while self._flights:
            self.land(self._flights.popleft())

    def land(self, flight: EnqueuedBatch) -> None:
        """Wait for a batch and book what came of it."""
        flight.ended.wait()
        members = flight.members
        for member in members:
            member.sequence.in_flight -= 1
        sampled = self._accept(members, flight.choice)
        now = self._clock()
        seconds = flight.ended.seconds_since(flight.began)
        if seconds is None:
            seconds = now - flight.frame.started
        self._tell(flight, max(0.0, seconds - flight.frame.inside), now)
        flight.outer.inside += seconds
        for member, token in zip(members, sampled, strict=True):
            self._advance(member, token, now, flight.dispatched)

    def _promise(self, member: BatchMember, row: int, now: float) -> None:
        """A token comes, of which only its place is known."""
        sequence = member.sequence
        sequence.coming = row
        sequence.sampling.promise()
        if ends_with_next(sequence, self._intake.limits.max_model_len):
            self._policy.remove(sequence.id)
        elif not member.decodes:
            arrival = sequence.request.arrival
            self._policy.start_decode(sequence.id, sequence.enqueued, arrival, now)

    def _tell(self, flight: EnqueuedBatch, seconds: float, now: float) -> None:
        batch = flight.batch
        if flight.choice is None:
            batch = Batch(batch.kind)
        else:
            self._telemetry.count_batch(batch, flight.nested)
        if flight.dispatched:
            self._policy.measured(batch, seconds, now)
        else:
            self._policy.observe(batch, seconds, now)

    def _accept(
        self, members: list[BatchMember], choice: TokenChoice | None
    ) -> list[Sampled | None]:
        """The next token of each member that yields one."""
        if choice is None:
            return [None] * len(members)
        found = iter(self._sampler.accept(choice))
        return [next(found) if member.yields else None for member in members]

    def _advance(
        self, member: BatchMember, sampled: Sampled | None, now: float, dispatched: bool
    ) -> None:
        """Book what a batch did for one of its members."""
        sequence = member.sequence
        if dispatched:
            sequence.ahead -= member.tokens
            sequence.coming = None
        if sequence.over:
            if not sequence.in_flight:
                self._kv.remember(sequence.tokens, sequence.computed, sequence.table)
                self._roster.discard(sequence)
            return
        sequence.computed += member.tokens
        in_use = sequence.in_flight > 0
        self._kv.remember(sequence.tokens, sequence.computed, sequence.table, in_use=in_use)
        if sequence.request.hand_over is not None:
            self._exchange.computed(sequence)
        if sampled is not None:
            self._take(member, sampled, now, dispatched)

    def _take(self, member: BatchMember, sampled: Sampled, now: float, dispatched: bool) -> None:
        sequence = member.sequence
        first = sequence.made == 0
        output = take_token(sequence, sampled, self._intake.limits.max_model_len)
        self._emit(output)
        if sampled.error is None:
            self._telemetry.generation_tokens += 1
            if first:
                self._telemetry.count_first(sequence, now)
                self._intake.settle(sequence, now, served=True)
        if output.finish_reason is not None:
            if output.finish_reason == "handed_over":
                self._exchange.hand_over(sequence, now)
            self._roster.end(sequence)
        elif not (member.decodes or dispatched):
            arrival = sequence.request.arrival
            self._policy.start_decode(sequence.id, sequence.computed, arrival, now)
