"""The attention backend for CPUs with kernels of this project (`pla_serve.engine.kernels`)."""

from __future__ import annotations

import torch

from pla_serve.engine.attention.sdpa import SdpaCpu, context
from pla_serve.engine.batch.flat import FlatBatch, Span
from pla_serve.engine.kernels.amx import Tiles
from pla_serve.engine.kernels.open import CpuKernels
from pla_serve.engine.kernels.vector import SpanTable, Vectors
from pla_serve.engine.kv.cache import KVCache

TILED_TOKENS = 64
"""Least new tokens for which the matrix unit pays: it needs a rearranged context."""


class VectorAttention:
    """Attention in the vector units, which read KV where it lies, whatever blocks it has.

    Many float32 tokens are attended by the matrix unit, if there is one. Heads of a size or type
    that no kernel supports are attended by torch.

    Args:
        vectors: kernels for the vector units.
        tiles: kernels for the matrix unit.
    """

    def __init__(self, vectors: Vectors, tiles: Tiles | None = None) -> None:
        self._vectors = vectors
        self._tiles = tiles
        self._torch = SdpaCpu()
        self._last: tuple[FlatBatch | None, SpanTable | None] = None, None

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        heads, tokens, dim = query.shape
        shape = (heads, cache.shape.heads, dim, query.dtype)
        if not self._vectors.attends(*shape):
            return self._torch.attend(layer, query, cache, batch, scaling)
        keys, values = cache.keys[layer], cache.values[layer]
        if query.stride(2) != 1:
            query = query.contiguous()
        tiles = self._tiles if self._tiles and self._tiles.attends(*shape) else None

        def tiled(tiles: Tiles, span: Span) -> torch.Tensor:
            own = context(keys, span.runs), context(values, span.runs)
            new = query[:, span.start : span.start + span.length]
            return tiles.attention(new, *own, span.history, scaling)

        if tiles is not None and len(batch.spans) == 1 and _is_long(batch.spans[0]):
            return tiled(tiles, batch.spans[0])
        output = query.new_empty(tokens, heads, dim)
        if (table := self.table(batch, without_long=tiles is not None)) is not None:
            self._vectors.attention(query, keys, values, table, scaling, output)
        if tiles is not None:
            for span in filter(_is_long, batch.spans):
                output[span.start : span.start + span.length] = tiled(tiles, span)
        return output

    def table(self, batch: FlatBatch, *, without_long: bool = False) -> SpanTable | None:
        """Return the table of the batch for the vector units, made once for all layers."""
        if self._last[0] is not batch:
            spans = [span for span in batch.spans if not (without_long and _is_long(span))]
            self._last = batch, SpanTable.of(spans) if spans else None
        return self._last[1]


def _is_long(span: Span) -> bool:
    return span.length >= TILED_TOKENS


def attention_of(kernels: CpuKernels) -> VectorAttention | SdpaCpu:
    """Return the attention backend of a CPU with these kernels."""
    if kernels.vectors is None:
        return SdpaCpu()
    return VectorAttention(kernels.vectors, kernels.tiles)
