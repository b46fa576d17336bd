"""Adapter for backends that cannot attend in batches with padding."""

from __future__ import annotations

import torch

from pla_serve.engine.attention.interface import AttentionBackend
from pla_serve.engine.batch.flat import FlatBatch
from pla_serve.engine.kv.cache import KVCache


class PaddedAttention:
    """Runs a backend on the real tokens, which come first, and returns zeros for the padding."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        heads, tokens, dim = query.shape
        real = sum(span.length for span in batch.spans)
        if real == tokens:
            return self._backend.attend(layer, query, cache, batch, scaling)
        output = query.new_zeros(tokens, heads, dim)
        if real:
            output[:real] = self._backend.attend(layer, query[:, :real], cache, batch, scaling)
        return output
