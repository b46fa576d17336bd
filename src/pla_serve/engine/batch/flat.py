"""One forward pass as data: a flat, ragged batch of tokens and where their KV lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pla_serve.engine.kv.blocks import BlockRun


@dataclass(frozen=True, slots=True)
class Paged:
    """Where each sequence's tokens and KV lie, as a kernel on the device reads it: int32 tensors.

    Sequences beyond the real ones have no new tokens and no context.
    """

    query_starts: torch.Tensor
    """(sequences + 1,): flat position of the first new token of each; the last is their sum."""
    contexts: torch.Tensor
    """(sequences,): history and new tokens."""
    table_starts: torch.Tensor
    """(sequences,): where in ``table`` each one's blocks begin."""
    table: torch.Tensor
    """Block numbers of all sequences, one behind the other."""
    block_tokens: int
    most_query: int
    """No sequence has more new tokens."""
    most_context: int
    """No sequence has a longer context. The host's knowledge; a captured graph's is its limit."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive new tokens of one sequence, on top of its history."""

    start: int
    """Position of the first one in the flat batch."""
    length: int
    history: int
    """Tokens before them whose KV is in the cache."""
    runs: tuple[BlockRun, ...]
    """Slots of history and new tokens, in order, as runs of neighbours."""


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Tokens of all spans one after another; no padding.

    Shapes: ``tokens``, ``positions`` and ``slots`` are (tokens,) int64; ``outputs`` (rows,) int64
    names the flat positions whose logits are wanted.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    outputs: torch.Tensor
    spans: tuple[Span, ...]
    paged: Paged | None = None
    """For backends that read lengths and blocks on the device."""


@dataclass(frozen=True, slots=True)
class SpanRequest:
    """What one sequence brings to a batch."""

    tokens: Sequence[int]
    """The new tokens."""
    history: int
    runs: Sequence[BlockRun]
    """Its blocks, which cover history and new tokens, as runs of neighbours."""
    wants_logits: bool
    """Whether the logits of the last new token are wanted."""
    carried: int | None = None
    """Row among the carried tokens (`Executor.forward`) that is its one new token: one that the
    host does not know yet. ``tokens`` has something else in its place."""


def build(requests: Sequence[SpanRequest], block_tokens: int, device: torch.device) -> FlatBatch:
    """Lay out the requests one behind the other."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    outputs: list[int] = []
    spans: list[Span] = []
    for request in requests:
        length = len(request.tokens)
        end = request.history + length
        runs = slot_runs(request.runs, end, block_tokens)
        spans.append(Span(len(tokens), length, request.history, runs))
        tokens += request.tokens
        positions += range(request.history, end)
        slots += _slots_from(runs, request.history)
        if request.wants_logits:
            outputs.append(len(tokens) - 1)
    return FlatBatch(
        _as_tensor(tokens, device),
        _as_tensor(positions, device),
        _as_tensor(slots, device),
        _as_tensor(outputs, device),
        tuple(spans),
    )


def slot_runs(runs: Sequence[BlockRun], tokens: int, block_tokens: int) -> tuple[BlockRun, ...]:
    """The first ``tokens`` slots of these runs of blocks."""
    slots: list[BlockRun] = []
    left = tokens
    for first, end in runs:
        if left <= 0:
            break
        taken = min((end - first) * block_tokens, left)
        slots.append((first * block_tokens, first * block_tokens + taken))
        left -= taken
    return tuple(slots)


def _slots_from(runs: Sequence[BlockRun], skip: int) -> list[int]:
    """Slots of the runs after the first ``skip`` of them."""
    slots: list[int] = []
    for start, end in runs:
        length = end - start
        if skip < length:
            slots += range(start + skip, end)
            skip = 0
        else:
            skip -= length
    return slots


def _as_tensor(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
