"""Every request that the engine has, and the states that it goes through."""

from __future__ import annotations

from pla_serve.engine.loop.parts import LoopContext
from pla_serve.engine.requests.sequence import Sequence

REFRESH = 8
"""Most waiting requests whose cached prefix is looked up again in one step."""


class RequestTable:
    """Sequences by request id, and the changes of state that the policy hears of.

    ====================  =========================================================================
    state                 meaning, and how a sequence gets there
    ====================  =========================================================================
    waiting               the policy has it, and its prefix is looked up again when the prefix
                          cache changes (`wait`; `preempt`, which takes its KV)
    parked                it waits for KV blocks in the memory gate, unknown to the policy
    started               it has its KV blocks (`start`; `resume_parked` after parking)
    late                  it has all its KV but that of its last token, and the policy does not
                          know it until its grammar has answered (`sit_out`, `take_answered`)
    over                  it has ended, and batches or transfers still write to its blocks (`end`)
    ====================  =========================================================================

    A sequence that is over and written to by nobody is removed.
    """

    def __init__(self, context: LoopContext) -> None:
        parts = context.parts
        self._policy = parts.policy
        self._kv = parts.kv
        self._gate = parts.gate
        self._exchange = parts.exchange
        self._telemetry = context.telemetry
        self._clock = context.clock
        self._sequences: dict[str, Sequence] = {}
        self._waiting: dict[str, Sequence] = {}
        """Sequences in state waiting. The first one's prefix is looked up again first."""
        self._late: dict[str, Sequence] = {}
        """Sequences in state late."""

    def __len__(self) -> int:
        """Return the number of sequences in any state."""
        return len(self._sequences)

    def get(self, request_id: str) -> Sequence | None:
        """Return the sequence of a request, or None if it is unknown or removed."""
        return self._sequences.get(request_id)

    def insert(self, sequence: Sequence) -> None:
        """Enter a sequence that was admitted, in none of the states yet."""
        self._sequences[sequence.id] = sequence

    def wait(self, sequence: Sequence) -> None:
        """Have a sequence without KV blocks wait for its first chunk.

        The policy counts the prefix that was found cached when it was last looked up.
        """
        self._waiting[sequence.id] = sequence
        self._policy.add(sequence.prefill(sequence.seen_cached), self._clock())

    def decode(self, sequence: Sequence, context: int, now: float) -> None:
        """Have a sequence that got a token at ``now`` decode, on ``context`` cached tokens."""
        request = sequence.request
        self._policy.start_decode(
            sequence.id, context, request.arrival, now, request.tenant, request.tpot
        )

    def start(self, sequence: Sequence) -> None:
        """End the waiting: the sequence gets its KV blocks now, or is parked."""
        self._waiting.pop(sequence.id, None)

    def resume_parked(self) -> None:
        """Give the policy those parked sequences that get their KV blocks now.

        Sequences of tenants that have more than their share lose theirs, if that helps.
        """
        if not len(self._gate):
            return
        now = self._clock()
        self._unpark(now)
        victims = self._gate.overdrawn(now)
        for victim in victims:
            self.preempt(victim)
        if victims:
            self._unpark(now)

    def _unpark(self, now: float) -> None:
        for sequence in self._gate.unpark(now):
            self._policy.add(sequence.prefill(sequence.computed), now)

    @property
    def any_late(self) -> bool:
        """Whether some sequence waits for its grammar."""
        return bool(self._late)

    def sit_out(self, sequence: Sequence) -> None:
        """Take a sequence from the policy, without its next token, until its grammar answers.

        It may lose its KV blocks meanwhile: then it is prefilled again as any other one.
        """
        self._policy.remove(sequence.id)
        self._late[sequence.id] = sequence

    def take_answered(self) -> list[Sequence]:
        """Return late sequences whose grammar has answered, or failed. They are late no more."""
        answered = [one for one in self._late.values() if one.sampling.can_go_on]
        for sequence in answered:
            del self._late[sequence.id]
        return answered

    def refresh(self) -> None:
        """Look up the prefixes of a few waiting sequences, and tell the policy what has changed.

        Between two versions of the prefix cache each sequence is looked up once.
        """
        version = self._kv.version
        for _ in range(min(REFRESH, len(self._waiting))):
            request_id, sequence = next(iter(self._waiting.items()))
            if sequence.seen_version == version:
                return
            del self._waiting[request_id]
            self._waiting[request_id] = sequence
            known = sequence.seen_cached
            if self.look_up(sequence) != known:
                self._policy.add(sequence.prefill(sequence.seen_cached), self._clock())

    def look_up(self, sequence: Sequence) -> int:
        """Return how many leading tokens are in the prefix cache now, and note it."""
        sequence.seen_version = self._kv.version
        sequence.seen_cached = self._kv.cached_prefix(
            sequence.tokens, sequence.table.scope, sequence.reusable
        )
        return sequence.seen_cached

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's KV blocks. It waits to be prefilled again, with its output so far."""
        assert not sequence.in_flight
        self._late.pop(sequence.id, None)
        self._telemetry.recompute_preemptions += 1
        self._policy.remove(sequence.id)
        self._exchange.withdraw(sequence)
        self._gate.release(sequence)
        sequence.computed = 0
        self.look_up(sequence)
        self.wait(sequence)

    def end(self, sequence: Sequence) -> None:
        """End a sequence, which has its last token or was aborted.

        Its id and its KV blocks stay taken as long as something writes to the blocks.
        """
        sequence.over = True
        self._late.pop(sequence.id, None)
        self._policy.remove(sequence.id)
        if not sequence.in_flight:
            self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Free the id and the KV blocks of a sequence. The prefix cache keeps what it knows."""
        del self._sequences[sequence.id]
        sequence.sampling.close()
        self._waiting.pop(sequence.id, None)
        self._exchange.withdraw(sequence)
        self._gate.release(sequence)
