"""Decides whether a fused layer of quantised weights can run as one call, and makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pla_serve.engine.attention.interface import ForwardContext
from pla_serve.engine.attention.vector import VectorAttention
from pla_serve.engine.kernels.open import CpuKernels
from pla_serve.engine.kernels.quantised_layer import (
    MOST_TOKENS,
    LayerWeights,
    QuantisedLayer,
    WeightsAndBias,
)
from pla_serve.engine.layers.cpu.quantised import QuantisedGate, QuantisedLinear
from pla_serve.engine.layers.cpu.second_half import Mlp

if TYPE_CHECKING:
    from pla_serve.engine.layers.cpu.layer import FusedLayer


class WholeLayer:
    """Runs a fused layer of quantised weights in one call, for at most MOST_TOKENS tokens.

    Args:
        layer: fused layer whose weights are used, where they lie.
        kernels: kernels for quantised weights and for attention.

    Raises:
        TypeError: the layer has a part for which the call has no code.
    """

    def __init__(self, layer: FusedLayer, kernels: CpuKernels) -> None:
        quantised, vectors = kernels.quantised, kernels.vectors
        heads = layer.query_heads, layer.kv_heads, layer.head_dim
        if quantised is None or vectors is None or not vectors.attends(*heads, torch.float32):
            raise TypeError("there are no kernels for this layer")
        if layer.query_norm is not None or not layer.turns_in_vectors:
            raise TypeError("the call has no norms of queries, and no other rotary embedding")
        mlp = layer.second_half
        if not isinstance(mlp, Mlp) or not isinstance(mlp.gated, QuantisedGate):
            raise TypeError("the weights are not quantised")
        weights = LayerWeights(
            qkv=_product(layer.qkv),
            out=_product(layer.out),
            gate=_product(mlp.gated.gate),
            up=_product(mlp.gated.up),
            down=_product(mlp.down),
            before_attention=layer.before_attention,
            before_mlp=mlp.norm,
            query_heads=layer.query_heads,
            kv_heads=layer.kv_heads,
            head_dim=layer.head_dim,
            scaling=layer.scaling,
        )
        self._index = layer.layer_idx
        self._call = QuantisedLayer(quantised, weights)

    def forward(
        self, inputs: torch.Tensor, turn: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor | None:
        """Return the output (tokens, hidden) for few float32 tokens; None for other batches."""
        if len(inputs) > MOST_TOKENS or inputs.dtype != torch.float32:
            return None
        if not isinstance(context.backend, VectorAttention):
            return None
        table = context.backend.table(context.batch)
        if table is None:
            return None
        memory = context.cache.keys[self._index], context.cache.values[self._index]
        if memory[0].dtype != torch.float32:
            return None
        return self._call(inputs, turn, context.batch.slots, memory, table)


def whole_layer(layer: FusedLayer, kernels: CpuKernels) -> WholeLayer | None:
    """Return the layer as one call; None if it has another form."""
    try:
        return WholeLayer(layer, kernels)
    except TypeError:
        return None


def _product(linear: object) -> WeightsAndBias:
    if not isinstance(linear, QuantisedLinear):
        raise TypeError("the weights are not quantised")
    bias = None if linear.bias is None else linear.bias.data
    return WeightsAndBias(linear.matrices, bias)
