"""Counters of one engine since its start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pla_serve.engine.requests.sequence import Sequence
from pla_serve.policy.protocol import Batch
from pla_serve.wire.engine import LatencySample


@dataclass(slots=True)
class Telemetry:
    """Counters since the start, and first tokens since the last report."""

    prefix_queries: int = 0
    """Tokens of prefills that began."""
    prefix_hits: int = 0
    """Tokens of these prefills that were in the prefix cache."""
    prompt_tokens: int = 0
    """New tokens that were prefilled."""
    generation_tokens: int = 0
    """Output tokens that were made."""
    express_batches: int = 0
    """Batches that ran at a layer boundary of another one."""
    recompute_preemptions: int = 0
    """Times that a sequence lost its KV and was prefilled again."""
    steps_ahead: int = 0
    """Batches that were enqueued while the one before was not settled."""
    steps_waited: Counter[str] = field(default_factory=Counter)
    """Batches that waited for the one before to be settled, by reason."""
    batches: Counter[str] = field(default_factory=Counter)
    """Batches by class."""
    firsts: list[LatencySample] = field(default_factory=list)
    """Times to first tokens since the last report."""

    def count_batch(self, batch: Batch, nested: bool) -> None:
        """Count a batch that was computed."""
        self.batches[batch.kind.value] += 1
        self.express_batches += nested
        self.prompt_tokens += sum(chunk.tokens for chunk in batch.prefills)

    def count_lookup(self, sequence: Sequence) -> None:
        """Count the tokens of a prefill that begins, and those that were cached."""
        self.prefix_queries += len(sequence.tokens)
        self.prefix_hits += sequence.computed

    def count_first(self, sequence: Sequence, now: float) -> None:
        """Note the time to first token, unless another engine made the first token."""
        if sequence.request.generated:
            return
        arrival = sequence.request.arrival
        queued = (sequence.started if sequence.started is not None else now) - arrival
        self.firsts.append(LatencySample(sequence.short, queued, now - arrival))

    def take_firsts(self) -> list[LatencySample]:
        """Return the times to first tokens, and begin a new list."""
        firsts, self.firsts = self.firsts, []
        return firsts
