"""Data of one forward pass: a flat batch of tokens without padding, and where their KV lies.

A batch is described twice. `SpanRequest` is what the loop asks for: the new tokens of one sequence,
its history and its KV blocks. `FlatBatch` is what the model computes: tensors on the device, in
which the sequences follow one another. `pla_serve.engine.batch.staging` turns the first into the
second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pla_serve.engine.kv.blocks import BlockRun


@dataclass(frozen=True, slots=True)
class SpanScores:
    """Log probabilities that are wanted of tokens of a prompt.

    Example: of a prompt (5, 8, 2, 9), of which a span computes the last three tokens, the scores of
    tokens 2 and 9 come after its first two: ``SpanScores(first=0, targets=[2, 9], top=1)``.
    """

    first: int
    """New token of the span after which the first target comes."""
    targets: Sequence[int]
    """Tokens that come after this new token, and after those that follow it."""
    top: int
    """Number of likeliest tokens that are wanted besides each target."""


@dataclass(frozen=True, slots=True)
class SpanRequest:
    """New tokens of one sequence in a batch.

    Example: a sequence with 20 cached tokens in KV blocks 3 and 4 (of 16 tokens each) decodes its
    next token, number 17 of the vocabulary::

        SpanRequest(tokens=[17], history=20, runs=[(3, 5)], wants_logits=True)
    """

    tokens: Sequence[int]
    """New tokens, at least one."""
    history: int
    """Number of tokens before the new ones. Their KV has been written."""
    runs: Sequence[BlockRun]
    """KV blocks of history and new tokens, in order, as runs (first, end) of neighbours."""
    wants_logits: bool
    """Whether the logits of the last new token are wanted."""
    carried: int | None = None
    """Row of the single new token among the carried tokens (see `Executor.forward`), if the host
    does not know the token yet. ``tokens`` then has any one number in its place."""
    scores: SpanScores | None = None
    """Log probabilities of the prompt that this batch computes; None for none."""
    pooled: tuple[int, int] | None = None
    """New tokens (first, end) of the span whose last hidden states are added up for an embedding;
    None for none."""
    numbers: NDArray[np.int32] | None = field(default=None, compare=False)
    """(blocks,): the blocks of ``runs`` one by one, if the caller keeps them
    (`BlockTable.numbers`). None: they are made from ``runs``."""

    def block_numbers(self, count: int) -> NDArray[np.int32]:
        """Return the first ``count`` blocks as (count,) int32."""
        if self.numbers is None:
            parts = [np.arange(first, end, dtype=np.int32) for first, end in self.runs]
            return np.concatenate(parts)[:count]
        return self.numbers[:count]


@dataclass(frozen=True)
class Span:
    """Consecutive new tokens of one sequence in a flat batch."""

    start: int
    """Position of the first new token in the flat batch."""
    length: int
    """Number of new tokens."""
    history: int
    """Number of tokens before the new ones. Their KV is in the cache."""
    blocks: Sequence[BlockRun]
    """KV blocks of history and new tokens, in order, as runs of neighbours. More may follow."""
    block_tokens: int
    """Number of tokens in a block."""

    @cached_property
    def runs(self) -> tuple[BlockRun, ...]:
        """KV slots of history and new tokens, in order, as runs (first, end) of neighbours.

        Kernels that read block tables on the device never ask for it.
        """
        return slot_runs(self.blocks, self.history + self.length, self.block_tokens)


@dataclass(frozen=True, slots=True)
class Paged:
    """Lengths and block tables of a batch, as int32 tensors that kernels read on the device.

    Padding sequences follow the real ones. They have no new tokens and no context.
    """

    query_starts: torch.Tensor
    """(sequences + 1,): flat position of the first new token of each sequence, then their sum."""
    contexts: torch.Tensor
    """(sequences,): history plus new tokens."""
    table_starts: torch.Tensor
    """(sequences,): index in ``table`` at which the blocks of each sequence begin."""
    table: torch.Tensor
    """(entries,): block numbers of all sequences, one sequence after another."""
    block_tokens: int
    """Number of tokens in a block."""
    most_query: int
    """Upper bound of the new tokens of a sequence."""
    most_context: int
    """Upper bound of the context of a sequence: the longest one of this batch, or the limit that a
    graph was captured for."""


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Tokens of all sequences, one sequence after another.

    Shapes: ``tokens``, ``positions`` and ``slots`` are (tokens,) int64. ``slots`` are the KV slots
    that the tokens write to. ``outputs`` is (rows,) int64: flat positions whose logits are wanted.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    outputs: torch.Tensor
    spans: tuple[Span, ...]
    """Lengths and slots as the host knows them, for attention backends that loop over sequences."""
    paged: Paged | None = None
    """Lengths and blocks for attention backends that read them on the device."""


def last_tokens(batch: FlatBatch) -> FlatBatch | None:
    """Return a batch of the tokens whose logits are wanted, with all before them as history.

    The last decoder layer needs to compute no others, once the KV of all tokens is written.

    Returns:
        None if that would save little, or if a token whose logits are wanted is not the last of
        its sequence.
    """
    rows = batch.outputs.tolist()
    if 2 * len(rows) > len(batch.tokens):
        return None
    ends = {span.start + span.length - 1: span for span in batch.spans}
    if not all(row in ends for row in rows):
        return None
    spans = []
    for index, row in enumerate(rows):
        span = ends[row]
        history = span.history + span.length - 1
        spans.append(Span(index, 1, history, span.blocks, span.block_tokens))
    picked = batch.outputs
    return FlatBatch(
        tokens=batch.tokens[picked],
        positions=batch.positions[picked],
        slots=batch.slots[picked],
        outputs=torch.arange(len(rows)),
        spans=tuple(spans),
    )


def slot_runs(runs: Sequence[BlockRun], tokens: int, block_tokens: int) -> tuple[BlockRun, ...]:
    """Return the first ``tokens`` KV slots of these runs of blocks, as runs of slots.

    Example: ``slot_runs([(3, 5), (9, 10)], tokens=35, block_tokens=16)`` is
    ``((48, 80), (144, 147))``.
    """
    slots: list[BlockRun] = []
    left = tokens
    for first, end in runs:
        if left <= 0:
            break
        taken = min((end - first) * block_tokens, left)
        slots.append((first * block_tokens, first * block_tokens + taken))
        left -= taken
    return tuple(slots)
