"""KV memory of all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token's KV takes."""

    layers: int
    heads: int
    """KV heads."""
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values over all layers."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values by layer, each (slots, kv heads, head dim); slots in blocks of neighbours."""

    def __init__(self, shape: KVShape, slots: int, device: torch.device) -> None:
        self.shape = shape
        self.slots = slots
        size = (shape.layers, slots, shape.heads, shape.head_dim)
        # Written now, not when a prompt first comes to a page: with large pages, a prompt of 16
        # tokens would wait until the system has cleared one for each layer. (`torch.zeros` leaves
        # that to the system, which does it at the first write.)
        keys = torch.empty(size, dtype=shape.dtype, device=device).zero_()
        values = torch.empty(size, dtype=shape.dtype, device=device).zero_()
        self.keys = list(keys.unbind(0))
        self.values = list(values.unbind(0))

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store (tokens, kv heads, head dim) keys and values at ``slots`` (tokens,)."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)
