"""A fused decoder layer for CPUs: the results of the stock layer in a third of its operations.

With one token, the time of a layer of a small model is that of its number of calls. With many
tokens, the passes over memory between matrix products take up to a quarter of their time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pla_serve.engine.attention.interface import ForwardContext
from pla_serve.engine.batch.flat import FlatBatch, last_tokens
from pla_serve.engine.kernels.open import TORCH_ALONE, CpuKernels
from pla_serve.engine.kernels.vector import Vectors
from pla_serve.engine.layers.cpu.join import joined, reordered
from pla_serve.engine.layers.cpu.norm import FusedRMSNorm, rms_epsilon
from pla_serve.engine.layers.cpu.second_half import plus, second_half
from pla_serve.engine.layers.cpu.whole import whole_layer
from pla_serve.engine.loading.stock import require_children
from pla_serve.engine.parallel.modules import unwrap


class Angles(tuple[torch.Tensor, torch.Tensor]):
    """Rotary embedding as ``(cos, sin)`` for stock layers, and as one complex tensor ``turn``.

    One complex multiplication rotates a pair of neighbouring elements.
    """

    turn: torch.Tensor
    """(tokens, 1, head dim / 2), complex: cos + i sin."""


class TurningRotary(nn.Module):
    """Wraps the rotary embedding of a model so that it returns `Angles`."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor, *kind: str) -> Angles:
        """Return the angles of ``position_ids`` (1, tokens); ``kind`` is that of the layers."""
        cos, sin = self.stock(hidden, position_ids, *kind)
        angles = Angles((cos, sin))
        half = cos.shape[-1] // 2
        angles.turn = torch.complex(cos[0, :, None, :half].float(), sin[0, :, None, :half].float())
        return angles


class FusedLayer(nn.Module):
    """Decoder layer of Llama, Qwen2 (with biases) and Qwen3 (with norms of queries and keys).

    In place of the MLP there may be a mixture of experts.

    Queries, keys and values come from one product. The rows of queries and keys are reordered such
    that the two elements that the rotary embedding rotates together are neighbours. Both have the
    same order, so no score changes. Few tokens of a layer of quantised weights run as one call
    (``whole``), where its parts allow.

    Args:
        stock: layer of transformers whose weights are taken over.
        kernels: used where they support these shapes.

    Raises:
        AttributeError, TypeError, ValueError: the stock layer is built in another way.
    """

    def __init__(self, stock: Any, kernels: CpuKernels = TORCH_ALONE) -> None:
        super().__init__()
        attention = stock.self_attn
        require_children(stock, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        require_children(attention, {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"})
        self.layer_idx: int = attention.layer_idx
        self.is_last = False
        """Whether no decoder layer follows; whoever puts the layer into a model says so."""
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        vectors, dtype = kernels.vectors, stock.input_layernorm.weight.dtype
        turns = vectors is not None and vectors.turns(self.head_dim, dtype)
        self._vectors = vectors if turns else None
        self.query_heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        order = _neighbours(self.head_dim)
        self.before_attention = _norm(stock.input_layernorm, vectors)
        has_norms = hasattr(attention, "q_norm"), hasattr(attention, "k_norm")
        self.query_norm = _norm(attention.q_norm, vectors, order) if has_norms[0] else None
        self.key_norm = _norm(attention.k_norm, vectors, order) if has_norms[1] else None
        self.qkv = joined(
            kernels,
            reordered(attention.q_proj, order),
            reordered(attention.k_proj, order),
            attention.v_proj,
        )
        out, self._ranks = unwrap(attention.o_proj)
        self.out = joined(kernels, out)
        before_mlp = _norm(stock.post_attention_layernorm, vectors)
        self.second_half = second_half(stock.mlp, before_mlp, kernels)
        self.whole = whole_layer(self, kernels) if self._ranks is None else None

    @property
    def turns_in_vectors(self) -> bool:
        """Whether a kernel applies the rotary embedding."""
        return self._vectors is not None

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        position_embeddings: Angles,
        forward_context: ForwardContext,
        **_: Any,
    ) -> torch.Tensor:
        """Return the layer's output (1, tokens, hidden), and write the KV of its tokens.

        The last layer returns zeros for tokens whose logits nobody wants, if they are many and not
        every state is wanted.
        """
        inputs, turn = hidden_states[0], position_embeddings.turn
        if self.whole is not None:
            outputs = self.whole.forward(inputs, turn, forward_context)
            if outputs is not None:
                return outputs.unsqueeze(0)
        heads = self.qkv.of_normed(inputs, self.before_attention)
        heads = heads.view(len(inputs), -1, self.head_dim)
        queries = self._turned(heads, turn, forward_context)
        batch = forward_context.batch
        prunes = self.is_last and not forward_context.every_state
        wanted = last_tokens(batch) if prunes else None
        if wanted is None:
            return self._rest(inputs, queries, forward_context, batch).unsqueeze(0)
        output = torch.zeros_like(inputs)
        if len(wanted.tokens):
            rows = batch.outputs
            output[rows] = self._rest(inputs[rows], queries[rows], forward_context, wanted)
        return output.unsqueeze(0)

    def _rest(
        self,
        inputs: torch.Tensor,
        queries: torch.Tensor,
        context: ForwardContext,
        batch: FlatBatch,
    ) -> torch.Tensor:
        """Return the layer's output of the tokens of a batch whose KV is written.

        Args:
            inputs: (tokens, hidden).
            queries: (tokens, query heads, head dim), rotated.
        """
        attended = context.backend.attend(
            self.layer_idx, queries.transpose(0, 1), context.cache, batch, self.scaling
        )
        middle = plus(self.out, attended.reshape(len(inputs), -1), inputs, self._ranks)
        outputs: torch.Tensor = self.second_half(middle)
        return outputs

    def _turned(
        self, heads: torch.Tensor, turn: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Write keys and values to the cache; return rotated queries (tokens, query heads, dim)."""
        cache, slots = context.cache, context.batch.slots
        heads = self._normed(heads)
        if self._vectors is not None:
            keys, values = cache.keys[self.layer_idx], cache.values[self.layer_idx]
            self._vectors.rotary(heads, turn, slots, keys, values)
            return heads[:, : self.query_heads]
        count = self.query_heads + self.kv_heads
        paired = heads[:, :count].float().view(len(heads), count, -1, 2)
        rotated = torch.view_as_real(torch.view_as_complex(paired).mul(turn))
        rotated = rotated.view(len(heads), count, self.head_dim).to(heads.dtype)
        queries, turned_keys = rotated[:, : self.query_heads], rotated[:, self.query_heads :]
        cache.write(self.layer_idx, slots, turned_keys, heads[:, count:])
        return queries

    def _normed(self, heads: torch.Tensor) -> torch.Tensor:
        """Apply the norms of queries and keys, if the model has them, to (tokens, heads, dim)."""
        if self.query_norm is None or self.key_norm is None:
            return heads
        sizes = [self.query_heads, self.kv_heads, self.kv_heads]
        queries, keys, values = torch.split(heads, sizes, 1)
        return torch.cat((self.query_norm(queries), self.key_norm(keys), values), dim=1)


def _norm(stock: Any, vectors: Vectors | None, order: torch.Tensor | None = None) -> FusedRMSNorm:
    epsilon = rms_epsilon(stock)
    if epsilon is None:
        raise TypeError(f"{type(stock).__name__} is no plain RMS norm")
    weight = stock.weight if order is None else stock.weight[order]
    return FusedRMSNorm(weight, epsilon, vectors)


def _neighbours(head_dim: int) -> torch.Tensor:
    """Return an order of a head's elements in which elements i and i + dim/2 are neighbours."""
    return torch.arange(head_dim).view(2, -1).t().flatten()
