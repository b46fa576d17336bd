"""A batch from the moment it is prepared to the moment it is settled."""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.engine.batch.flat import SpanRequest, SpanScores
from pla_serve.engine.device.marks import DeviceMark
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.run.pooling import HiddenSum
from pla_serve.engine.run.scoring import ScoredTokens
from pla_serve.engine.sampling import TokenChoice
from pla_serve.policy.protocol import Batch, Chunk


@dataclass(frozen=True, slots=True)
class BatchMember:
    """Part of one sequence that a batch computes."""

    sequence: Sequence
    tokens: int
    """Number of new tokens."""
    decodes: bool
    """Whether this is a decode step, and not a prefill."""
    yields: bool
    """Whether the next token is chosen from the logits of the last new token."""
    span: SpanRequest
    """The new tokens with their KV blocks, for the executor."""

    def add_pooled(self, total: HiddenSum) -> None:
        """Add the sum of hidden states that the batch has made of the sequence's embedding."""
        assert self.sequence.pool is not None
        assert self.span.pooled is not None
        first, end = self.span.pooled
        self.sequence.pool.add(total, end - first)


def member_of(sequence: Sequence, chunk: Chunk, *, decodes: bool) -> BatchMember:
    """Return what a batch computes of ``sequence``, which has KV blocks for it.

    A token that only the device knows is named by its row in the dispatched batch.
    """
    yields = decodes or chunk.completes
    history = sequence.enqueued
    tokens = sequence.tokens[history : history + chunk.tokens]
    carried = None
    if len(tokens) < chunk.tokens:
        tokens, carried = [0], sequence.chosen_row
        assert carried is not None
    table = sequence.table
    span = SpanRequest(
        tokens,
        history,
        table.runs(),
        yields,
        carried,
        _scores(sequence, history, chunk.tokens),
        None if sequence.pool is None else sequence.pool.wanted(history, chunk.tokens),
        table.numbers(),
    )
    return BatchMember(sequence, chunk.tokens, decodes, yields, span)


def _scores(sequence: Sequence, history: int, tokens: int) -> SpanScores | None:
    """Return the scores of the prompt that ``tokens`` after ``history`` are the first to allow.

    The logits after token i score token i + 1.
    """
    if not sequence.scoring:
        return None
    prompt, top = sequence.request.prompt, sequence.request.sampling.prompt_logprobs
    first = max(history, sequence.scored)
    end = min(history + tokens, len(prompt) - 1)
    if top is None or first >= end:
        return None
    return SpanScores(first - history, prompt[first + 1 : end + 1], top)


@dataclass(slots=True)
class BatchTimes:
    """Times of one batch, which batches that run inside it add to."""

    started: float
    """Time at which the host began to enqueue the batch."""
    nested_seconds: float = 0.0
    """Seconds that nested batches have taken."""


@dataclass(slots=True, kw_only=True)
class EnqueuedBatch:
    """A batch whose work is enqueued on the device, and which is not settled yet."""

    batch: Batch
    members: list[BatchMember]
    choice: TokenChoice | None
    """Tokens that the batch chooses. None if it was abandoned at a layer boundary."""
    scored: list[ScoredTokens | None]
    """Log probabilities of prompts, for each member; None where it wants none."""
    pooled: list[HiddenSum | None]
    """Sums of hidden states, for each member; None where it wants no embedding."""
    times: BatchTimes
    outer_times: BatchTimes
    """Times of the batch around it. A batch of its own has times here that nobody reads."""
    nested: bool
    """Whether it ran at a layer boundary of another batch."""
    whole: bool
    """Whether it ran without layer boundaries, so that the device may have all of it to do yet."""
    began: DeviceMark
    """Mark in the device's stream of work before the batch."""
    ended: DeviceMark
    """Mark after the batch and the choice of its tokens."""
    dispatched: bool = False
    """Whether policy and sequences have gone on as if it had been computed."""
