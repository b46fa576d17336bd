"""Attention with torch's scaled dot product: a reference for any device, and a fast CPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from pla_serve.engine.attention.cache import KVCache
from pla_serve.engine.batch.flat import FlatBatch, Span
from pla_serve.engine.kv.blocks import BlockRun
from pla_serve.engine.layers.amx import Tiles

TILED_TOKENS = 64
"""New tokens of a sequence from which rearranging its context for the matrix unit pays."""


class SdpaReference:
    """One masked call for each sequence; slow, short, right."""

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See AttentionBackend."""
        output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        for span in batch.spans:
            end = span.start + span.length
            keys = context(cache.keys[layer], span.runs).transpose(0, 1).unsqueeze(0)
            values = context(cache.values[layer], span.runs).transpose(0, 1).unsqueeze(0)
            mask = torch.ones(
                span.length, keys.shape[2], dtype=torch.bool, device=query.device
            ).tril(span.history)
            attended = scaled_dot_product_attention(
                query[:, span.start : end].unsqueeze(0),
                keys,
                values,
                attn_mask=mask,
                scale=scaling,
                enable_gqa=True,
            )
            output[span.start : end] = attended[0].transpose(0, 1)
        return output


class SdpaCpu:
    """Torch's CPU flash kernel: no mask, no copy of a context that is one run.

    A chunk on top of history is two calls, one over the history without a mask and one over the
    chunk itself with the causal one, merged by their log-sum-exp. Without a mask, the queries that
    share a KV head are rows of one product, which reads that head once; with one, they read it
    through a stride of zero rather than a copy for each.

    Args:
        tiles: attends many float32 tokens in less time, where it takes heads of this shape.
    """

    def __init__(self, tiles: Tiles | None = None) -> None:
        self._tiles = tiles

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See AttentionBackend."""
        keys, values = cache.keys[layer], cache.values[layer]
        heads, tokens, head_dim = query.shape
        kv_heads = cache.shape.heads
        tiles = self._tiles
        if tiles is not None and not tiles.attends(heads, kv_heads, head_dim, query.dtype):
            tiles = None
        grouped = query.view(kv_heads, -1, tokens, head_dim)
        attended = [
            _attend_one(grouped[:, :, span.start], keys, values, span, scaling)
            if span.length == 1
            else _attend_many(
                grouped[:, :, span.start : span.start + span.length], keys, values, span, scaling
            )
            if tiles is None or span.length < TILED_TOKENS
            else tiles.attention(
                query[:, span.start : span.start + span.length],
                context(keys, span.runs),
                context(values, span.runs),
                span.history,
                scaling,
            )
            for span in batch.spans
        ]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def context(memory: torch.Tensor, runs: Sequence[BlockRun]) -> torch.Tensor:
    """Rows of ``memory`` (slots, ...) in these runs; a view where it is one run."""
    if len(runs) == 1:
        start, end = runs[0]
        return memory[start:end]
    return torch.cat([memory[start:end] for start, end in runs])


def _for_groups(memory: torch.Tensor, runs: Sequence[BlockRun], groups: int) -> torch.Tensor:
    """The context in ``runs`` as (kv heads, groups, slots, dim), groups by a stride of zero.

    One call makes the view: a decode step makes many, and each costs a microsecond.
    """
    rows = memory if len(runs) == 1 else context(memory, runs)
    start, end = runs[0] if len(runs) == 1 else (0, rows.shape[0])
    slots, heads, dim = rows.stride()
    return rows.as_strided(
        (rows.shape[1], groups, end - start, rows.shape[2]),
        (heads, 0, slots, dim),
        rows.storage_offset() + start * slots,
    )


def _attend_one(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: Span, scaling: float
) -> torch.Tensor:
    """(kv heads, groups, dim) to (1, heads, dim); keys and values are the layer's memory."""
    output, _ = _flash(
        query.unsqueeze(1),
        _for_groups(keys, span.runs, 1),
        _for_groups(values, span.runs, 1),
        False,
        scaling,
    )
    return output.reshape(1, -1, query.shape[2])


def _attend_many(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: Span, scaling: float
) -> torch.Tensor:
    """(kv heads, groups, tokens, dim) to (tokens, heads, dim)."""
    keys = _for_groups(keys, span.runs, query.shape[1])
    values = _for_groups(values, span.runs, query.shape[1])
    if (split := span.history) == 0:
        attended = _flash(query, keys, values, True, scaling)[0]
    else:
        own, own_lse = _flash(query, keys[:, :, split:], values[:, :, split:], True, scaling)
        old, old_lse = _unmasked(query, keys[:, :, :split], values[:, :, :split], scaling)
        # The softmax over both parts weighs each by its share of the summed exponentials.
        share = torch.sigmoid(own_lse - old_lse).unsqueeze(-1).to(own.dtype)
        attended = torch.lerp(old, own, share)
    return attended.flatten(0, 1).transpose(0, 1)


def _unmasked(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``_flash`` without a mask: no query minds which group and token its neighbours are of."""
    heads, groups, tokens, dim = query.shape
    rows = query.reshape(heads, 1, groups * tokens, dim)
    output, lse = _flash(rows, keys[:, :1], values[:, :1], False, scaling)
    return output.reshape(query.shape), lse.reshape(heads, groups, tokens)


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp (kv heads, groups, tokens)."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, attn_mask=None, scale=scaling
    )
    return output, lse
