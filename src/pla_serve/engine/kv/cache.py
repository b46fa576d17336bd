"""The KV cache: keys and values of all layers in one memory each."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    """

    def __init__(self, shape: KVShape, slots: int, device: torch.device) -> None:
        self.shape = shape
        self.slots = slots
        size = (shape.layers, slots, shape.heads, shape.head_dim)
        # The memory is written now, so that no prompt waits for it: the system clears a page at its
        # first write, and with large pages even a short prompt would wait for one in each layer.
        # `torch.zeros` would leave the pages to be cleared then.
        keys = torch.empty(size, dtype=shape.dtype, device=device).zero_()
        values = torch.empty(size, dtype=shape.dtype, device=device).zero_()
        self.keys = list(keys.unbind(0))
        self.values = list(values.unbind(0))

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store keys and values, each (tokens, KV heads, head dim), at ``slots`` (tokens,)."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)
