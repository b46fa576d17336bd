"""Attention by torch's scaled dot product: a reference for any device, and the backend for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from pla_serve.engine.batch.flat import FlatBatch, Span
from pla_serve.engine.kv.blocks import BlockRun
from pla_serve.engine.kv.cache import KVCache


class SdpaReference:
    """The reference: one masked call for each sequence. Slow, and simple enough to be trusted."""

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
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
    """Attention by torch's flash kernel for CPUs, without masks in memory.

    A context that is one run of blocks is not copied. New tokens with history take two calls, one
    over the history without a mask and one over the new tokens with the causal mask, which are
    merged by their log-sum-exps. Without a mask, all queries that share a KV head are rows of one
    product, so the head is read once; with the causal mask they share it through a stride of zero.
    """

    def attend(
        self, layer: int, query: torch.Tensor, cache: KVCache, batch: FlatBatch, scaling: float
    ) -> torch.Tensor:
        """See `AttentionBackend`."""
        keys, values = cache.keys[layer], cache.values[layer]
        _, tokens, head_dim = query.shape
        kv_heads = cache.shape.heads
        grouped = query.view(kv_heads, -1, tokens, head_dim)
        attended = [
            _attend_one(grouped[:, :, span.start], keys, values, span, scaling)
            if span.length == 1
            else _attend_many(
                grouped[:, :, span.start : span.start + span.length], keys, values, span, scaling
            )
            for span in batch.spans
        ]
        return attended[0] if len(attended) == 1 else torch.cat(attended)


def context(memory: torch.Tensor, runs: Sequence[BlockRun]) -> torch.Tensor:
    """Return the rows of ``memory`` (slots, ...) in these runs; a view if there is one run."""
    if len(runs) == 1:
        start, end = runs[0]
        return memory[start:end]
    return torch.cat([memory[start:end] for start, end in runs])


def grouped_context(memory: torch.Tensor, runs: Sequence[BlockRun], groups: int) -> torch.Tensor:
    """Return the context in ``runs`` as (KV heads, groups, slots, dim), with stride 0 for groups.

    The view is made by one call: a decode step makes many views, and each call takes 1 µs.
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
    """Attend one new token.

    Args:
        query: (KV heads, groups, dim).
        keys: memory of the layer, as is ``values``: (slots, KV heads, dim).

    Returns:
        (1, query heads, dim).
    """
    output, _ = _flash(
        query.unsqueeze(1),
        grouped_context(keys, span.runs, 1),
        grouped_context(values, span.runs, 1),
        False,
        scaling,
    )
    return output.reshape(1, -1, query.shape[2])


def _attend_many(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, span: Span, scaling: float
) -> torch.Tensor:
    """Attend several new tokens: query (KV heads, groups, tokens, dim) to (tokens, heads, dim)."""
    keys = grouped_context(keys, span.runs, query.shape[1])
    values = grouped_context(values, span.runs, query.shape[1])
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
    """Return `_flash` without a mask, computed as one product for each KV head.

    Without a mask the result of a query does not depend on its token or group, so all queries of a
    KV head can be rows of one matrix.
    """
    heads, groups, tokens, dim = query.shape
    rows = query.reshape(heads, 1, groups * tokens, dim)
    output, lse = _flash(rows, keys[:, :1], values[:, :1], False, scaling)
    return output.reshape(query.shape), lse.reshape(heads, groups, tokens)


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the log-sum-exp (KV heads, groups, tokens) of torch's flash kernel."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, attn_mask=None, scale=scaling
    )
    return output, lse
