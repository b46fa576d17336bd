"""A decoder layer in ten kernels: four matrix products, attention, and what lies between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from pla_serve.engine.attention.interface import ForwardContext
from pla_serve.engine.layers.gpu.operations import Heads, Operations
from pla_serve.engine.layers.stock import require_children
from pla_serve.engine.parallel.modules import unwrap


class GpuLayer(nn.Module):
    """Llama's decoder layer, also with biases (Qwen2) or with norms of queries and keys (Qwen3).

    One product for queries, keys and values, and one for gate and up. Residuals are added by the
    products that precede them, in place: the layer overwrites its input.

    Raises:
        AttributeError, TypeError, ValueError: the stock layer is built otherwise.
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
        self.attention_type = getattr(stock, "attention_type", None)  # some models look it up
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
        """(1, tokens, hidden) to the same, in place; writes the KV of its tokens."""
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
        """Before attention: (tokens, hidden) to (heads, tokens, dim); writes the KV."""
        cos, sin = angles
        normed = self._operations.rms_norm(hidden, self.before_attention, self.epsilon)
        joint = linear(normed, self.qkv, self.qkv_bias)
        keys, values = context.cache.keys[self.layer_idx], context.cache.values[self.layer_idx]
        return self._operations.rotate_and_store(
            joint, self.heads, (cos[0], sin[0]), context.batch.slots, keys, values
        )

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> None:
        """After attention, (tokens, heads, dim): the rest of the layer, into ``hidden``."""
        self._add(hidden, attended.reshape(len(hidden), -1), self.out)
        normed = self._operations.rms_norm(hidden, self.before_mlp, self.epsilon)
        gated = self._operations.gate(linear(normed, self.gate_up))
        self._add(hidden, gated, self.down)

    def _add(self, hidden: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """The product of all ranks, into ``hidden``, which only one of them brings."""
        if self._ranks is None or self._ranks.leads:
            hidden.addmm_(inputs, weight.t())
        else:
            torch.mm(inputs, weight.t(), out=hidden)
        if self._ranks is not None:
            self._ranks.sum_in_place(hidden)


def _joined(*linears: nn.Linear) -> tuple[nn.Parameter, nn.Parameter | None]:
    """One matrix whose outputs are those of all these, one behind the other."""
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
    """Weight and epsilon; that it is a plain RMS norm is told by running the whole layer."""
    weight, epsilon = stock.weight, stock.variance_epsilon
    if not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float):
        raise TypeError(f"{type(stock).__name__} is no RMS norm")
    return nn.Parameter(weight.data, requires_grad=False), epsilon
