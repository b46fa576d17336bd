"""One forward pass as data: a flat, ragged batch of tokens and where their KV lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Run = tuple[int, int]
"""Slots from the first up to, not including, the second."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive new tokens of one sequence, on top of its history."""

    start: int
    """Position of the first one in the flat batch."""
    length: int
    history: int
    """Tokens before them whose KV is in the cache."""
    runs: tuple[Run, ...]
    """Slots of history and new tokens, in order."""


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


@dataclass(frozen=True, slots=True)
class SpanRequest:
    """What one sequence brings to a batch."""

    tokens: Sequence[int]
    """The new tokens."""
    history: int
    blocks: Sequence[int]
    """Its block table, which covers history and new tokens."""
    wants_logits: bool
    """Whether the logits of the last new token are wanted."""


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
        runs = slot_runs(request.blocks, end, block_tokens)
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


def slot_runs(blocks: Sequence[int], tokens: int, block_tokens: int) -> tuple[Run, ...]:
    """The first ``tokens`` slots of a block table as the fewest runs of neighbours."""
    runs: list[Run] = []
    left = tokens
    start = previous = -2
    count = 0
    for block in blocks:
        if left <= 0:
            break
        if block != previous + 1:
            if count:
                runs.append((start * block_tokens, start * block_tokens + count))
            start, count = block, 0
        taken = min(block_tokens, left)
        count += taken
        left -= taken
        previous = block
    if count:
        runs.append((start * block_tokens, start * block_tokens + count))
    return tuple(runs)


def _slots_from(runs: Sequence[Run], skip: int) -> list[int]:
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
