"""Brings a flat batch to the device in one transfer, exact or padded to a captured shape.

All that a pass needs is whole numbers: they lie one behind the other in one int32 buffer, so that
one copy from pinned memory moves them, and a captured graph finds them where it expects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pla_serve.engine.batch.flat import FlatBatch, Paged, Span, SpanRequest, slot_runs
from pla_serve.engine.run.device import Device, DeviceMark

RING = 4
"""Host buffers in turn: the next batch is laid out while the device still reads the last ones."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Room for each part of a packed batch."""

    tokens: int
    sequences: int
    outputs: int
    entries: int
    """Block-table entries of all sequences together."""

    @property
    def size(self) -> int:
        """Numbers in the buffer."""
        return self.table_at + self.entries

    @property
    def table_at(self) -> int:
        """Where the block tables begin: the last part, of which only what is used is copied."""
        return 3 * self.tokens + self.outputs + 3 * self.sequences + 1


@dataclass(frozen=True, slots=True)
class Scratch:
    """KV slots that belong to nobody; padding writes there."""

    first: int
    count: int


class Uploader(Protocol):
    """Takes numbers to the device."""

    def upload(self, numbers: NDArray[np.int32], target: torch.Tensor | None) -> torch.Tensor:
        """Into the front of ``target``, or into a tensor of its own."""
        ...


class DirectUploader:
    """Copies at once: where host and device share memory, or nobody is in a hurry."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")

    def upload(self, numbers: NDArray[np.int32], target: torch.Tensor | None) -> torch.Tensor:
        """See `Uploader`."""
        source = torch.from_numpy(numbers)
        if target is None:
            return source.to(self._device)
        target[: len(source)].copy_(source)
        return target


class PinnedUploader:
    """Asynchronous copies from a ring of pinned buffers."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor | None] = [None] * RING
        self._marks: list[DeviceMark | None] = [None] * RING
        self._turn = 0

    def upload(self, numbers: NDArray[np.int32], target: torch.Tensor | None) -> torch.Tensor:
        """See `Uploader`; waits only if the ring's copies of RING batches ago are not done."""
        turn = self._turn = (self._turn + 1) % RING
        mark = self._marks[turn]
        if mark is not None:
            mark.wait()
        buffer = self._buffers[turn]
        if buffer is None or len(buffer) < len(numbers):
            length = 1 << (len(numbers) - 1).bit_length()
            buffer = torch.empty(length, dtype=torch.int32, pin_memory=True)
            self._buffers[turn] = buffer
        source = buffer[: len(numbers)]
        source.numpy()[:] = numbers
        if target is None:
            target = torch.empty(len(numbers), dtype=torch.int32, device=self._device.torch_device)
        target[: len(numbers)].copy_(source, non_blocking=True)
        self._marks[turn] = self._device.record()
        return target


def capacity_of(requests: Sequence[SpanRequest], block_tokens: int) -> Capacity:
    """What these requests need, without padding."""
    return Capacity(
        tokens=sum(len(request.tokens) for request in requests),
        sequences=len(requests),
        outputs=sum(request.wants_logits for request in requests),
        entries=sum(_blocks(request, block_tokens) for request in requests),
    )


def pack(
    requests: Sequence[SpanRequest], capacity: Capacity, block_tokens: int, scratch: Scratch
) -> tuple[NDArray[np.int32], tuple[Span, ...]]:
    """The numbers of a batch as `unpack` finds them; unused table entries are left off.

    Padding: tokens behind the real ones that write to scratch slots, sequences without tokens, and
    outputs that name the first token. A carried token is packed as -1 less its row, for
    `put_carried`.

    Raises:
        ValueError: the requests exceed the capacity.
    """
    need = capacity_of(requests, block_tokens)
    room = (capacity.tokens, capacity.sequences, capacity.outputs, capacity.entries)
    wanted = (need.tokens, need.sequences, need.outputs, need.entries)
    if any(a > b for a, b in zip(wanted, room, strict=True)):
        raise ValueError(f"a batch of {need} does not fit into {capacity}")
    numbers = np.zeros(capacity.table_at + need.entries, dtype=np.int32)
    tokens, positions, slots, outputs, starts, contexts, table_starts = _parts(numbers, capacity)
    table = numbers[capacity.table_at :]
    spans: list[Span] = []
    at = row = entry = 0
    for index, request in enumerate(requests):
        length = len(request.tokens)
        context = request.history + length
        runs = slot_runs(request.runs, context, block_tokens)
        spans.append(Span(at, length, request.history, runs))
        tokens[at : at + length] = request.tokens
        if request.carried is not None:
            tokens[at] = -1 - request.carried
        positions[at : at + length] = np.arange(request.history, context)
        blocks = _block_numbers(request, block_tokens)
        table[entry : entry + len(blocks)] = blocks
        own = positions[at : at + length]
        slots[at : at + length] = blocks[own // block_tokens] * block_tokens + own % block_tokens
        starts[index], contexts[index], table_starts[index] = at, context, entry
        at += length
        entry += len(blocks)
        if request.wants_logits:
            outputs[row] = at - 1
            row += 1
    starts[len(requests) :] = at
    padding = capacity.tokens - at
    if padding:
        slots[at:] = scratch.first + np.arange(padding) % scratch.count
    return numbers, tuple(spans)


def put_carried(buffer: torch.Tensor, capacity: Capacity, carried: torch.Tensor) -> None:
    """Put tokens that never left the device where `pack` has left room for them.

    A row of ``carried`` that is no token (see `Choice.chosen`) becomes token 0: what is computed of
    it is for nobody.

    Args:
        carried: (rows,) int64 on the device.
    """
    tokens = buffer[: capacity.tokens]
    found = carried.clamp(min=0).index_select(0, (-1 - tokens).clamp(min=0))
    tokens.copy_(torch.where(tokens < 0, found, tokens))


def unpack(
    buffer: torch.Tensor,
    capacity: Capacity,
    spans: tuple[Span, ...],
    block_tokens: int,
    *,
    most_query: int,
    most_context: int,
) -> FlatBatch:
    """The batch whose numbers are at the front of ``buffer``, as views of it.

    Tokens, positions, slots and outputs become int64 in one operation, as stock modules want them.
    """
    wide = buffer[: 3 * capacity.tokens + capacity.outputs].long()
    count, sequences = capacity.tokens, capacity.sequences
    tokens, positions, slots, outputs = torch.split(wide, [count, count, count, capacity.outputs])
    at = len(wide)
    paged = Paged(
        query_starts=buffer[at : at + sequences + 1],
        contexts=buffer[at + sequences + 1 : at + 2 * sequences + 1],
        table_starts=buffer[at + 2 * sequences + 1 : at + 3 * sequences + 1],
        table=buffer[capacity.table_at :],
        block_tokens=block_tokens,
        most_query=most_query,
        most_context=most_context,
    )
    return FlatBatch(tokens, positions, slots, outputs, spans, paged)


def _parts(numbers: NDArray[np.int32], capacity: Capacity) -> list[NDArray[np.int32]]:
    count, sequences = capacity.tokens, capacity.sequences
    sizes = [count, count, count, capacity.outputs, sequences + 1, sequences, sequences]
    return np.split(numbers[: capacity.table_at], np.cumsum(sizes)[:-1])


def _blocks(request: SpanRequest, block_tokens: int) -> int:
    return -(-(request.history + len(request.tokens)) // block_tokens)


def _block_numbers(request: SpanRequest, block_tokens: int) -> NDArray[np.int32]:
    ranges = [np.arange(first, end, dtype=np.int32) for first, end in request.runs]
    numbers = ranges[0] if len(ranges) == 1 else np.concatenate(ranges)
    return numbers[: _blocks(request, block_tokens)]
