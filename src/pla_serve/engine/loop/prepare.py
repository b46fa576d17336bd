"""What of a batch can run now: who has the memory for it, and whose memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pla_serve.engine.loop.parts import EngineParts
from pla_serve.engine.loop.requests import RequestTable
from pla_serve.engine.loop.running import BatchMember
from pla_serve.engine.loop.settle import Booking
from pla_serve.engine.loop.telemetry import Telemetry
from pla_serve.policy.protocol import Batch, Chunk
from pla_serve.wire.engine import Outbound


class Preparation:
    """Readies the batches of one loop."""

    def __init__(
        self,
        parts: EngineParts,
        roster: RequestTable,
        booking: Booking,
        telemetry: Telemetry,
        *,
        emit: Callable[[Outbound], None],
        clock: Callable[[], float],
    ) -> None:
        self._policy = parts.policy
        self._kv = parts.kv
        self._gate = parts.gate
        self._exchange = parts.exchange
        self._roster = roster
        self._booking = booking
        self._telemetry = telemetry
        self._emit = emit
        self._clock = clock
        self._preempted: set[str] = set()
        """Who lost its memory while the batch at hand was prepared."""

    def prepare(self, batch: Batch) -> tuple[Batch, list[BatchMember]]:
        """The part of ``batch`` that can run now; the rest goes back to the policy."""
        self._preempted.clear()
        decodes = tuple(c for c in batch.decodes if self._ready_to_decode(c))
        # The growth of one decode may have taken the memory of others in this batch, or brought
        # to light that they have ended.
        decodes = tuple(c for c in decodes if self._is_here(c))
        prefills = tuple(c for c in batch.prefills if self._ready_to_prefill(c))
        members = [self._member(chunk, False) for chunk in prefills]
        members += [self._member(chunk, True) for chunk in decodes]
        for member in members:
            member.sequence.in_flight += 1
        return replace(batch, prefills=prefills, decodes=decodes), members

    def _member(self, chunk: Chunk, decodes: bool) -> BatchMember:
        sequence = self._roster.get(chunk.request_id)
        assert sequence is not None
        return BatchMember(sequence, chunk.tokens, decodes, decodes or chunk.completes)

    def _is_here(self, chunk: Chunk) -> bool:
        sequence = self._roster.get(chunk.request_id)
        return (
            sequence is not None and not sequence.over and chunk.request_id not in self._preempted
        )

    def _ready_to_prefill(self, chunk: Chunk) -> bool:
        if not self._is_here(chunk):
            return False
        sequence = self._roster.get(chunk.request_id)
        assert sequence is not None
        now = self._clock()
        if not sequence.table.blocks:
            self._roster.start(sequence)
            left = len(sequence.tokens) - chunk.history
            short = self._policy.waits_as_short(left, chunk.history)
            if not self._gate.reserve(sequence, short, left, now):
                self._policy.remove(sequence.id)
                return False
        if sequence.enqueued != chunk.history:
            # The cache has changed since the policy was told: let it decide on the true numbers.
            self._policy.remove(sequence.id)
            self._policy.add(sequence.prefill(sequence.enqueued), now)
            return False
        if sequence.started is None:
            if sequence.request.hand_over is not None:
                self._emit(self._exchange.offer(sequence))
            sequence.started = now
            self._telemetry.count_lookup(sequence)
        return True

    def _ready_to_decode(self, chunk: Chunk) -> bool:
        while self._is_here(chunk):
            sequence = self._roster.get(chunk.request_id)
            assert sequence is not None
            if self._kv.grow(sequence.table, sequence.enqueued + 1):
                return True
            if self._booking.under_way:
                # What runs holds memory: that of those who end with it, and its own cannot be
                # taken before it is done.
                self._booking.land_all("memory")
                continue
            victim = self._gate.victim(sequence) or sequence
            self._preempted.add(victim.id)
            self._roster.preempt(victim)
        return False
