"""A fused decoder layer for GPUs: four matrix products, attention, and five small kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from pla_serve.engine.attention.interface import ForwardContext
from pla_serve.engine.layers.gpu.operations import Heads, Operations
from pla_serve.engine.loading.stock import require_children
from pla_serve.engine.parallel.modules import unwrap


class GpuLayer(nn.Module):
    """Decoder layer of Llama, Qwen2 (with biases) and Qwen3 (with norms of queries and keys).

    Queries, keys and values come from one product, gate and up from another. The products before a
    residual add to it in place, so the layer overwrites its input.

    Args:
        stock: layer of transformers whose weights are taken over.
        operations: the small kernels between the products.

    Raises:
        AttributeError, TypeError, ValueError: the stock layer is built in another way.
    """

    def __init__(self, stock: Any, operations: Operations) -> None:
        super().__init__()
        attention, mlp = stock.self_attn, stock.mlp
        require_children(stock, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        require_children(attention, {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"})
        require_children(mlp, {"gate_proj", "up_proj", "down_proj"}, {"act_fn"})
        self._operations = operations
        self.layer_idx: int = attention.layer_idx
        self.scaling: float = attention.scaling
        # Some models read this attribute of their layers.
        self.attention_type = getattr(stock, "attention_type", None)
        self.before_attention, self.epsilon = _norm(stock.input_layernorm)
        self.before_mlp, other = _norm(stock.post_attention_layernorm)
        norms = [
            _norm(getattr(attention, n)) for n in ("q_norm", "k_norm") if hasattr(attention, n)
        ]
        if len({self.epsilon, other, *(epsilon for _, epsilon in norms)}) != 1:
            raise ValueError("its norms differ in epsilon")
        dim: int = attention.head_dim
        if dim % 2 or len(norms) not in (0, 2):
            raise ValueError("its heads cannot be turned in two halves")
        self.heads = Heads(
            query=attention.q_proj.out_features // dim,
            kv=attention.k_proj.out_features // dim,
            dim=dim,
            query_norm=norms[0][0] if norms else None,
            key_norm=norms[1][0] if norms else None,
            epsilon=self.epsilon,
        )
        self.qkv, self.qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up, bias = _joined(mlp.gate_proj, mlp.up_proj)
        out, self._ranks = unwrap(attention.o_proj)
        down, _ = unwrap(mlp.down_proj)
        self.out, out_bias = _joined(out)
        self.down, down_bias = _joined(down)
        if any(found is not None for found in (bias, out_bias, down_bias)):
            raise ValueError("its output projections have biases")

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        forward_context: ForwardContext,
        **_: Any,
    ) -> torch.Tensor:
        """Compute the layer on (1, tokens, hidden) in place, and write the KV of its tokens."""
        hidden, context = hidden_states[0], forward_context
        queries = self.queries(hidden, position_embeddings, context)
        attended = context.backend.attend(
            self.layer_idx, queries, context.cache, context.batch, self.scaling
        )
        self.finish(hidden, attended)
        return hidden_states

    def queries(
        self,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        context: ForwardContext,
    ) -> torch.Tensor:
        """Compute the part before attention, and write the KV.

        Args:
            hidden: (tokens, hidden).
            angles: cos and sin of the rotary embedding, each (1, tokens, dim).

        Returns:
            Queries (heads, tokens, dim).
        """
        cos, sin = angles
        normed = self._operations.rms_norm(hidden, self.before_attention, self.epsilon)
        joint = linear(normed, self.qkv, self.qkv_bias)
        keys, values = context.cache.keys[self.layer_idx], context.cache.values[self.layer_idx]
        return self._operations.rotate_and_store(
            joint, self.heads, (cos[0], sin[0]), context.batch.slots, keys, values
        )

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> None:
        """Add the part after attention, whose result is (tokens, heads, dim), to ``hidden``."""
        self._add(hidden, attended.reshape(len(hidden), -1), self.out)
        normed = self._operations.rms_norm(hidden, self.before_mlp, self.epsilon)
        gated = self._operations.gate(linear(normed, self.gate_up))
        self._add(hidden, gated, self.down)

    def _add(self, hidden: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """Add the product of all ranks to ``hidden``, which counts on the leading rank only."""
        if self._ranks is None or self._ranks.leads:
            hidden.addmm_(inputs, weight.t())
        else:
            torch.mm(inputs, weight.t(), out=hidden)
        if self._ranks is not None:
            self._ranks.sum_in_place(hidden)


def _joined(*linears: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return weight and bias of one linear with the outputs of all these, one after another."""
    if any(type(one) is not nn.Linear for one in linears):
        raise TypeError("its projections are no plain linears")
    weights = [one.weight.data for one in linears]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    biases = [one.bias.data for one in linears if one.bias is not None]
    if len(biases) not in (0, len(linears)):
        raise ValueError("linears with and without a bias cannot be joined")
    joined = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return nn.Parameter(weight, requires_grad=False), joined


def _norm(stock: Any) -> tuple[nn.Parameter, float]:
    """Return weight and epsilon of a norm; the trial of the layer shows that it is an RMS norm."""
    weight, epsilon = stock.weight, stock.variance_epsilon
    if not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float):
        raise TypeError(f"{type(stock).__name__} is no RMS norm")
    return nn.Parameter(weight.data, requires_grad=False), epsilon
