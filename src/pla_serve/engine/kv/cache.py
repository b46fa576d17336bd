"""The KV cache: keys and values of all layers in one memory each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pla_serve.engine.kv.system_memory import SystemMemory

AHEAD_BYTES = 128 * 2**20
"""Memory beyond the highest slot in use that is made ready while the engine is idle. The system
rounds the part of each layer up to its pages, which may be large."""


@dataclass(frozen=True, slots=True)
class KVShape:
    """Shape and type of one token's KV."""

    layers: int
    heads: int
    """Number of KV heads."""
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values for each layer, each of shape (slots, KV heads, head dim).

    A slot holds one token. Block ``b`` of ``n`` tokens is the slots from ``b * n`` to
    ``(b + 1) * n - 1``.

    On a CPU the cache takes memory as slots come into use. The system clears a page at its first
    write, so `make_ready` has pages given ahead of that while there is nothing to compute.
    """

    def __init__(self, shape: KVShape, slots: int, device: torch.device) -> None:
        self.shape = shape
        self.slots = slots
        self._used = 0
        """Slots up to the highest one that was ever written."""
        self._ready = 0
        """Slots up to here have memory, or will have when `_steps` are done."""
        self._steps: Iterator[bool] = iter(())
        self._memories: list[SystemMemory] = []
        size = (shape.layers, slots, shape.heads, shape.head_dim)
        if device.type == "cpu":
            self._memories = [SystemMemory(size, shape.dtype) for _ in range(2)]
            keys, values = (memory.tensor for memory in self._memories)
        else:
            keys = torch.zeros(size, dtype=shape.dtype, device=device)
            values = torch.zeros(size, dtype=shape.dtype, device=device)
        self.keys = list(keys.unbind(0))
        self.values = list(values.unbind(0))

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store keys and values, each (tokens, KV heads, head dim), at ``slots`` (tokens,)."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def note_use(self, slots: torch.Tensor) -> None:
        """Note that these slots (tokens,) are written now. Does nothing for a GPU."""
        if self._memories and len(slots):
            self._used = max(self._used, int(slots.max()) + 1)

    def forget(self) -> None:
        """Give back the memory of all slots; none may be in use. Does nothing for a GPU."""
        for memory in self._memories:
            memory.release()
        self._used = self._ready = 0
        self._steps = iter(())

    def make_ready(self) -> bool:
        """Have the system give memory for slots that may be used next: one layer's keys or values.

        Returns False if nothing is left to do.
        """
        if next(self._steps, False):
            return True
        ahead = AHEAD_BYTES // max(1, self.shape.bytes_per_token)
        wanted = min(self.slots, self._used + ahead)
        if not self._memories or wanted <= self._ready:
            return False
        if self._used + ahead // 2 < self._ready:  # so that not each new token brings a step
            return False
        self._steps = self._populate(self._ready, wanted)
        self._ready = wanted
        return True

    def _populate(self, first: int, end: int) -> Iterator[bool]:
        """Populate these slots, one layer's keys or values a step; yields True after each."""
        layers = self.shape.layers
        row = self.shape.bytes_per_token // (2 * layers)
        for memory in self._memories:
            for layer in range(layers):
                at = layer * self.slots
                if not memory.populate((at + first) * row, (at + end) * row):
                    return
                yield True
