"""Every request that the engine has, and what the policy goes by while it waits for its prefill."""

from __future__ import annotations

from collections.abc import Callable

from pla_serve.engine.loop.parts import EngineParts
from pla_serve.engine.loop.telemetry import Telemetry
from pla_serve.engine.requests.sequence import Sequence

REFRESH = 8
"""Waiting requests whose cached prefix is looked up again in one step, if the cache changed."""


class RequestTable:
    """Sequences by id, from admission until nothing is left to be done for them."""

    def __init__(
        self, parts: EngineParts, telemetry: Telemetry, clock: Callable[[], float]
    ) -> None:
        self._policy = parts.policy
        self._kv = parts.kv
        self._gate = parts.gate
        self._exchange = parts.exchange
        self._telemetry = telemetry
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._unstarted: dict[str, Sequence] = {}
        """Wait for their first chunk; in the order in which their prefix is looked up again."""

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, request_id: str) -> Sequence | None:
        """None if there is no such request, or no more."""
        return self._sequences.get(request_id)

    def enter(self, sequence: Sequence) -> None:
        """It is admitted."""
        self._sequences[sequence.id] = sequence

    def await_start(self, sequence: Sequence) -> None:
        """It waits for its first chunk: the policy is told when more or less of it is cached."""
        self._unstarted[sequence.id] = sequence

    def start(self, sequence: Sequence) -> None:
        """It has its memory, or waits for some; its numbers are its own from here on."""
        self._unstarted.pop(sequence.id, None)

    def refresh(self) -> None:
        """Tell the policy what has become cached, or been evicted, while requests wait."""
        version = self._kv.version
        for _ in range(min(REFRESH, len(self._unstarted))):
            request_id, sequence = next(iter(self._unstarted.items()))
            if sequence.seen_version == version:
                return
            del self._unstarted[request_id]
            self._unstarted[request_id] = sequence
            told = sequence.seen_cached
            if self.look_up(sequence) != told:
                self._policy.add(sequence.prefill(sequence.seen_cached), self._clock())

    def look_up(self, sequence: Sequence) -> int:
        """How much of it is cached now."""
        sequence.seen_version = self._kv.version
        sequence.seen_cached = self._kv.cached_prefix(sequence.tokens, sequence.table.scope)
        return sequence.seen_cached

    def preempt(self, sequence: Sequence) -> None:
        """Take its memory; it is prefilled again, output so far included, when there is some."""
        assert not sequence.in_flight
        self._telemetry.recompute_preemptions += 1
        self._policy.remove(sequence.id)
        self._exchange.withdraw(sequence)
        self._gate.release(sequence)
        sequence.computed = 0
        self._unstarted[sequence.id] = sequence
        self._policy.add(sequence.prefill(self.look_up(sequence)), self._clock())

    def end(self, sequence: Sequence) -> None:
        """It has ended or was aborted. Its blocks stay while something under way writes to them,
        and as long its id is taken."""
        sequence.over = True
        self._policy.remove(sequence.id)
        if not sequence.in_flight:
            self.discard(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Nothing of it is left but what the prefix cache keeps."""
        del self._sequences[sequence.id]
        self._unstarted.pop(sequence.id, None)
        self._exchange.withdraw(sequence)
        self._gate.release(sequence)
