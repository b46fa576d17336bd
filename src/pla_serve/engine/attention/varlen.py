"""The attention backend ``varlen``: torch's own attention over paged KV (torch 2.13, CUDA)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from pla_serve.engine.batch.flat import FlatBatch
from pla_serve.engine.kv.cache import KVCache


def varlen_missing() -> str | None:
    """Return why this torch has no such attention; None if it has."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    known = inspect.signature(varlen_attn).parameters
    if not {"block_table", "seqused_k"} <= set(known):
        return f"varlen_attn of torch {torch.__version__} takes no block_table"
    return None


class VarlenAttention:
    """Attention by torch's ``varlen_attn``, whose causal mask is aligned to the end of contexts.

    Args:
        attend: called instead of ``varlen_attn``, for tests.
    """

    def __init__(self, attend: Callable[..., torch.Tensor] | None = None) -> None:
        self._attend: Callable[..., Any] = attend or _varlen_attn()
        self._batch: FlatBatch | None = None
        self._table: torch.Tensor | None = None

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBackend`. Rows of padding are undefined."""
        paged = batch.paged
        if paged is None:
            raise RuntimeError("this backend needs a batch that was staged for the device")
        pages = (-1, paged.block_tokens, *cache.keys[layer].shape[1:])
        output = self._attend(
            query.transpose(0, 1),
            cache.keys[layer].view(pages),
            cache.values[layer].view(pages),
            paged.query_starts,
            None,
            paged.most_query,
            paged.most_context,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=True,
            seqused_k=paged.contexts,
            block_table=self._rectangle(batch),
        )
        assert isinstance(output, torch.Tensor)
        return output

    def _rectangle(self, batch: FlatBatch) -> torch.Tensor:
        """Return the block tables of a batch, computed once for all its layers.

        A captured batch is an object of its own, so its graph contains this computation.
        """
        if self._table is None or self._batch is not batch:
            self._batch, self._table = batch, rectangle(batch)
        return self._table


def _varlen_attn() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def rectangle(batch: FlatBatch) -> torch.Tensor:
    """Return the block tables as one int32 tensor (sequences, most blocks), on the device.

    Entries behind the blocks of a sequence belong to other sequences and are never read.
    """
    paged = batch.paged
    assert paged is not None
    width = -(-paged.most_context // paged.block_tokens)
    places = torch.arange(width, dtype=torch.int32, device=paged.table.device)
    index = paged.table_starts.unsqueeze(1) + places
    return paged.table[index.clamp_(max=len(paged.table) - 1).long()]
