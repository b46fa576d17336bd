"""Reduces a batch that the policy has decided on to what can run now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pla_serve.engine.loop.batches import BatchMember, member_of
from pla_serve.engine.loop.faults import RequestFaults
from pla_serve.engine.loop.parts import LoopContext
from pla_serve.engine.loop.requests import RequestTable
from pla_serve.engine.loop.settle import BatchSettlement
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.policy.protocol import Batch, Chunk


class BatchPreparation:
    """Reserves the KV memory of batches, and takes it from others where that has to be."""

    def __init__(
        self,
        context: LoopContext,
        requests: RequestTable,
        settlement: BatchSettlement,
        faults: RequestFaults,
    ) -> None:
        self._context = context
        self._policy = context.parts.policy
        self._kv = context.parts.kv
        self._gate = context.parts.gate
        self._requests = requests
        self._settlement = settlement
        self._faults = faults

    def prepare(self, batch: Batch) -> tuple[Batch, list[BatchMember]]:
        """Return the part of ``batch`` that has its KV memory, and its members.

        The policy gets the rest back: parked, or added again with other numbers. Members are in
        flight from here on, prefills first.
        """
        preempted: set[str] = set()
        decodes = [c for c in batch.decodes if self._try(c, lambda c: self._grow(c, preempted))]
        # A decode step that grew may have taken the memory of another one in this batch, or
        # settled a batch with which that one has ended.
        decodes = [
            c for c in decodes if c.request_id not in preempted and self._find(c) is not None
        ]
        prefills = [
            c
            for c in batch.prefills
            if c.request_id not in preempted and self._try(c, self._reserve)
        ]
        members: list[BatchMember] = []
        prefills = [c for c in prefills if self._try(c, lambda c: self._join(c, members, False))]
        decodes = [c for c in decodes if self._try(c, lambda c: self._join(c, members, True))]
        for member in members:
            member.sequence.in_flight += 1
        return replace(batch, prefills=tuple(prefills), decodes=tuple(decodes)), members

    def _try(self, chunk: Chunk, prepare: Callable[[Chunk], bool]) -> bool:
        """Return what ``prepare`` does, or False if it raises: the request of the chunk ends."""
        sequence = self._find(chunk)
        if sequence is None:
            return False
        prepared = False
        with self._faults.of(sequence):
            prepared = prepare(chunk)
        return prepared  # noqa: RET504 - the block may end early, by an exception

    def _find(self, chunk: Chunk) -> Sequence | None:
        """Return the sequence of a chunk, or None if it has ended."""
        sequence = self._requests.get(chunk.request_id)
        return None if sequence is None or sequence.over else sequence

    def _join(self, chunk: Chunk, members: list[BatchMember], decodes: bool) -> bool:
        """Add a chunk whose KV memory is there to the members of the batch. Returns True."""
        sequence = self._requests.get(chunk.request_id)
        assert sequence is not None
        members.append(member_of(sequence, chunk, decodes=decodes))
        return True

    def _reserve(self, chunk: Chunk) -> bool:
        """Return whether a chunk of a prefill can run: with its first one, reserve KV for all."""
        sequence = self._find(chunk)
        if sequence is None:
            return False
        now = self._context.clock()
        if not sequence.table.blocks:
            self._requests.start(sequence)
            left = len(sequence.tokens) - chunk.history
            bulk = sequence.request.service.unhurried
            short = not bulk and self._policy.waits_as_short(left, chunk.history)
            if not self._gate.reserve(sequence, short, left, now):
                self._policy.remove(sequence.id)
                return False
        if sequence.enqueued != chunk.history:
            # The prefix cache has changed since the policy decided: it decides again.
            self._policy.remove(sequence.id)
            self._policy.add(sequence.prefill(sequence.enqueued), now)
            return False
        if sequence.started is None:
            if sequence.request.hand_over is not None:
                self._context.emit(self._context.parts.exchange.offer(sequence))
            sequence.started = now
            self._context.telemetry.count_lookup(sequence)
        return True

    def _grow(self, chunk: Chunk, preempted: set[str]) -> bool:
        """Return whether a decode step can run, with room for the KV of one more token.

        Without free memory, enqueued batches are settled first, since sequences may end with them.
        Then sequences are preempted, the one of least precedence first, which may be this one.
        """
        while chunk.request_id not in preempted:
            sequence = self._find(chunk)
            if sequence is None:
                return False
            if self._kv.grow(sequence.table, sequence.enqueued + 1):
                return True
            if self._settlement.pending:
                self._settlement.settle_all("memory")
                continue
            victim = self._gate.victim(sequence) or sequence
            preempted.add(victim.id)
            self._requests.preempt(victim)
        return False
