"""Lays a batch out and copies it to the device in one transfer.

A forward pass needs nothing but whole numbers: tokens, positions, slots, lengths and block tables.
`pack` writes them one after another into one int32 array, an `Uploader` copies that array to the
device, and `unpack` gives views of it as a `FlatBatch`. A captured graph finds each part at the
same place in each replay, because the places depend on the `Capacity` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pla_serve.engine.batch.flat import FlatBatch, Paged, Span, SpanRequest
from pla_serve.engine.device.marks import Device, DeviceMark

RING = 4
"""Number of pinned buffers, used in turn: the host fills one while the device reads others."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Number of elements that each part of a packed batch has room for."""

    tokens: int
    sequences: int
    outputs: int
    entries: int
    """Block-table entries of all sequences together, the last part of the array."""

    @property
    def size(self) -> int:
        """Length of the int32 array."""
        return self.table_at + self.entries

    @property
    def table_at(self) -> int:
        """Index at which the block tables begin. Only the entries in use are copied."""
        return 3 * self.tokens + self.outputs + 3 * self.sequences + 1


@dataclass(frozen=True, slots=True)
class Scratch:
    """KV slots that no sequence owns. Padding tokens write to them."""

    first: int
    count: int


class Uploader(Protocol):
    """Copies packed batches to the device."""

    def upload(self, numbers: NDArray[np.int32], target: torch.Tensor | None) -> torch.Tensor:
        """Copy an array to the device.

        Args:
            numbers: (n,) int32, on the host.
            target: int32 tensor on the device, of at least n elements, whose front is overwritten.
                None: a new tensor is made.

        Returns:
            ``target``, or the new tensor. Work that is enqueued later finds the copy complete.
        """
        ...


class DirectUploader:
    """Copies before it returns: for the CPU, and where speed does not matter."""

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
    """Copies asynchronously, from a ring of pinned buffers."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor | None] = [None] * RING
        self._marks: list[DeviceMark | None] = [None] * RING
        self._turn = 0

    def upload(self, numbers: NDArray[np.int32], target: torch.Tensor | None) -> torch.Tensor:
        """See `Uploader`. Waits only if the copy of RING batches ago has not finished."""
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
    """Return the capacity that these requests fill exactly, without padding."""
    return Capacity(
        tokens=sum(len(request.tokens) for request in requests),
        sequences=len(requests),
        outputs=sum(request.wants_logits for request in requests),
        entries=sum(_blocks(request, block_tokens) for request in requests),
    )


def pack(
    requests: Sequence[SpanRequest], capacity: Capacity, block_tokens: int, scratch: Scratch
) -> tuple[NDArray[np.int32], tuple[Span, ...]]:
    """Return the array that `unpack` reads, and the spans of the requests.

    Padding tokens follow the real ones and write to scratch slots, padding sequences have no
    tokens, and padding outputs name the first token. The array ends with the last block-table
    entry in use. A carried token is packed as -1 minus its row, which `put_carried` replaces.

    Raises:
        ValueError: the requests exceed the capacity.
    """
    spans, flat, blocks, entries, outputs = _lay_out(requests, block_tokens)
    need = Capacity(len(flat), len(spans), len(outputs), sum(entries))
    room = (capacity.tokens, capacity.sequences, capacity.outputs, capacity.entries)
    wanted = (need.tokens, need.sequences, need.outputs, need.entries)
    if any(a > b for a, b in zip(wanted, room, strict=True)):
        raise ValueError(f"a batch of {need} does not fit into {capacity}")
    numbers = np.zeros(capacity.table_at + need.entries, dtype=np.int32)
    tokens, positions, slots, rows, starts, contexts, table_starts = _parts(numbers, capacity)
    slots[need.tokens :] = scratch.first + np.arange(capacity.tokens - need.tokens) % scratch.count
    starts[need.sequences :] = need.tokens
    if not requests:
        return numbers, ()
    table = numbers[capacity.table_at :]
    np.concatenate(blocks, out=table)
    tokens[: need.tokens] = flat
    rows[: need.outputs] = outputs
    lengths = np.array([span.length for span in spans])
    history = np.array([span.history for span in spans])
    first, entry = np.cumsum(lengths) - lengths, np.cumsum(entries) - entries
    starts[: need.sequences], table_starts[: need.sequences] = first, entry
    contexts[: need.sequences] = history + lengths
    own = np.arange(need.tokens) + np.repeat(history - first, lengths)
    positions[: need.tokens] = own
    block = table[np.repeat(entry, lengths) + own // block_tokens]
    slots[: need.tokens] = block * block_tokens + own % block_tokens
    return numbers, tuple(spans)


def _lay_out(
    requests: Sequence[SpanRequest], block_tokens: int
) -> tuple[list[Span], list[int], list[NDArray[np.int32]], list[int], list[int]]:
    """Return spans, new tokens, block numbers, the number of blocks of each request, and outputs.

    Outputs are the flat positions whose logits are wanted.
    """
    spans: list[Span] = []
    tokens: list[int] = []
    blocks: list[NDArray[np.int32]] = []
    entries: list[int] = []
    outputs: list[int] = []
    for request in requests:
        length, history = len(request.tokens), request.history
        spans.append(Span(len(tokens), length, history, request.runs, block_tokens))
        if request.carried is None:
            tokens.extend(request.tokens)
        else:
            tokens.append(-1 - request.carried)
        count = -(-(history + length) // block_tokens)
        blocks.append(request.block_numbers(count))
        entries.append(count)
        if request.wants_logits:
            outputs.append(len(tokens) - 1)
    return spans, tokens, blocks, entries, outputs


def put_carried(buffer: torch.Tensor, capacity: Capacity, carried: torch.Tensor) -> None:
    """Replace the placeholders that `pack` left by tokens that only the device knows.

    A negative entry of ``carried`` is no token (see `TokenChoice.chosen`). It becomes token 0, and
    nobody reads the result.

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
    """Return the batch that was packed into the front of ``buffer``.

    Block tables and lengths are views of ``buffer``. Tokens, positions, slots and outputs are
    copied to int64 in one operation, as the modules of ``transformers`` want them.
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


def stage(
    requests: Sequence[SpanRequest],
    block_tokens: int,
    uploader: Uploader,
    carried: torch.Tensor | None = None,
) -> FlatBatch:
    """Lay out a batch without padding and copy it to the device.

    Args:
        carried: (rows,) int64 on the device, for requests that name a row of it.
    """
    capacity = capacity_of(requests, block_tokens)
    numbers, spans = pack(requests, capacity, block_tokens, Scratch(0, 1))
    buffer = uploader.upload(numbers, None)
    if carried is not None:
        put_carried(buffer, capacity, carried)
    return unpack(
        buffer,
        capacity,
        spans,
        block_tokens,
        most_query=max(span.length for span in spans),
        most_context=max(span.history + span.length for span in spans),
    )


def _parts(numbers: NDArray[np.int32], capacity: Capacity) -> list[NDArray[np.int32]]:
    count, sequences = capacity.tokens, capacity.sequences
    sizes = [count, count, count, capacity.outputs, sequences + 1, sequences, sequences]
    return np.split(numbers[: capacity.table_at], np.cumsum(sizes)[:-1])


def _blocks(request: SpanRequest, block_tokens: int) -> int:
    return -(-(request.history + len(request.tokens)) // block_tokens)
