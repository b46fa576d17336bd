"""Compares a fused decoder layer with the stock one by running both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pla_serve.engine.attention.interface import ForwardContext
from pla_serve.engine.attention.sdpa import SdpaReference
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import DirectUploader, stage
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.layers.cpu.layer import FusedLayer, TurningRotary
from pla_serve.engine.layers.cpu.second_half import Mixture

TOKENS = 20
"""Tokens of each of two sequences: enough for the code path of many tokens."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference, as a share of the largest output: far above rounding, far below errors."""


def same_results(stock: nn.Module, fused: FusedLayer, rotary: TurningRotary) -> bool:
    """Whether both layers give the same results on random hidden states of two sequences.

    A mixture of experts, which both share, does nothing meanwhile: a router chooses other experts
    for numbers that differ by rounding.
    """
    if isinstance(fused.second_half, Mixture):
        with _passing_through(fused.second_half.block):
            return _compare(stock, fused, rotary)
    return _compare(stock, fused, rotary)


@contextmanager
def _passing_through(module: Any) -> Iterator[None]:
    """Have a module return its inputs."""
    module.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del module.forward


def _compare(stock: nn.Module, fused: FusedLayer, rotary: TurningRotary) -> bool:
    cpu = torch.device("cpu")
    dtype = next(stock.parameters()).dtype
    width = len(fused.before_attention.weight)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2 * TOKENS, width, generator=generator).to(dtype)
    slots = ((0, TOKENS), (TOKENS, 2 * TOKENS))
    requests = [SpanRequest([0] * TOKENS, 0, [run], True) for run in slots]
    batch = stage(requests, 1, DirectUploader())
    shape = KVShape(fused.layer_idx + 1, fused.kv_heads, fused.head_dim, dtype)
    positions = batch.positions.unsqueeze(0)
    results = []
    for layer in (stock, fused):
        context = ForwardContext(batch, KVCache(shape, 2 * TOKENS, cpu), SdpaReference())
        result = layer(
            hidden,
            attention_mask=None,
            position_ids=positions,
            position_embeddings=rotary(hidden, positions),
            forward_context=context,
        )
        results.append(result)
    expected, got = results
    if expected.shape != got.shape:
        return False
    tolerance = TOLERANCE[dtype] * expected.abs().max()
    return bool((expected - got).abs().max() <= tolerance)
