"""Counters of one engine since its start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pla_serve.engine.requests.sequence import Sequence
from pla_serve.policy.protocol import Batch, BatchClass, ServiceLevel
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
    offline_tokens: int = 0
    """Tokens of prompts and outputs that offline batches computed."""
    offline_seconds: float = 0.0
    """Time of these batches, without what ran inside them."""
    idle_seconds: float = 0.0
    """Time in which nothing ran."""
    batches: Counter[str] = field(default_factory=Counter)
    """Batches by class."""
    firsts: list[LatencySample] = field(default_factory=list)
    """Times to first tokens since the last report."""

    def count_batch(self, batch: Batch, seconds: float, nested: bool) -> None:
        """Count a batch that was computed, in ``seconds`` without what ran inside it."""
        self.batches[batch.kind.value] += 1
        if batch.kind is BatchClass.OFFLINE:
            self.offline_tokens += batch.tokens
            self.offline_seconds += seconds
        self.express_batches += nested
        self.prompt_tokens += sum(chunk.tokens for chunk in batch.prefills)

    def count_lookup(self, sequence: Sequence) -> None:
        """Count the tokens of a prefill that begins, and those that were cached."""
        self.prefix_queries += len(sequence.tokens)
        self.prefix_hits += sequence.computed

    def count_first(self, sequence: Sequence, now: float) -> None:
        """Note the time to first token, unless another engine made the first token."""
        if sequence.request.generated or sequence.request.service is ServiceLevel.OFFLINE:
            return
        arrival = sequence.request.arrival
        queued = (sequence.started if sequence.started is not None else now) - arrival
        self.firsts.append(LatencySample(sequence.short, queued, now - arrival))

    def take_firsts(self) -> list[LatencySample]:
        """Return the times to first tokens, and begin a new list."""
        firsts, self.firsts = self.firsts, []
        return firsts
