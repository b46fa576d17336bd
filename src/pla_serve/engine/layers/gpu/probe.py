"""Compares a fused layer with the stock one by running both on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pla_serve.engine.attention.interface import ForwardContext
from pla_serve.engine.attention.sdpa import SdpaReference
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import DirectUploader, stage
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.layers.gpu.layer import GpuLayer

TOKENS = 5
"""Tokens of each of two sequences."""
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2}
"""Largest difference, as a share of the norm of what the layer adds; float32 may use tf32."""


def same_results(stock: nn.Module, fused: GpuLayer, rotary: Any) -> str | None:
    """Return how the results of both layers differ, as text; None if they do not."""
    weight = fused.before_attention
    device, dtype = weight.device, weight.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2 * TOKENS, len(weight), generator=generator).to(device, dtype)
    requests = [SpanRequest([0] * TOKENS, 0, [(first, first + TOKENS)], True) for first in (0, 5)]
    batch = stage(requests, 1, DirectUploader(device))
    shape = KVShape(1, fused.heads.kv, fused.heads.dim, dtype)
    positions = batch.positions.unsqueeze(0)
    results = []
    for layer in (stock, fused):
        cache = KVCache(shape, 2 * TOKENS, device)
        # Memory for one layer is enough: all layer numbers get the same.
        cache.keys = [cache.keys[0]] * (fused.layer_idx + 1)
        cache.values = [cache.values[0]] * (fused.layer_idx + 1)
        result = layer(
            hidden.clone(),
            attention_mask=None,
            position_ids=positions,
            position_embeddings=rotary(hidden, positions),
            forward_context=ForwardContext(batch, cache, SdpaReference()),
        )
        results.append((result - hidden).float())
    expected, got = results
    if expected.shape != got.shape:
        return f"shape {tuple(got.shape)}"
    difference = float((expected - got).norm() / expected.norm())
    return None if difference <= TOLERANCE[dtype] else f"{difference:.2g} of the norm"
