"""Attention backends, and the function through which stock models of transformers call them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from pla_serve.engine.batch.flat import FlatBatch
from pla_serve.engine.kv.cache import KVCache

IMPLEMENTATION = "pla_serve_paged"
"""Value of ``attn_implementation`` for models that the engine runs.

No mask function is registered under this name, so transformers builds no masks.
"""

APART = "pla_serve_paged_apart"
"""Value of ``attn_implementation`` for models whose layers are compiled by torch.

Attention stays outside of the compiled code; see `set_apart`.
"""


class AttentionBackend(Protocol):
    """An implementation of causal attention over paged KV, for the new tokens of a flat batch."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        cache: KVCache,
        batch: FlatBatch,
        scaling: float,
    ) -> torch.Tensor:
        """Return the attention of each new token over its own sequence.

        Args:
            layer: number of the decoder layer.
            query: (query heads, tokens, head dim), in the order of the batch.
            cache: KV of all sequences; that of the new tokens has been written already.
            scaling: factor on the scores, usually head dim ** -0.5.

        Returns:
            (tokens, query heads, head dim).
        """
        ...


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Batch, cache and backend of one forward pass; stock models pass it on as a keyword."""

    batch: FlatBatch
    cache: KVCache
    backend: AttentionBackend
    every_state: bool = False
    """Whether the hidden states of all tokens are wanted, and not of ``batch.outputs`` only."""


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    forward_context: ForwardContext | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write keys and values to the cache and attend; transformers calls this in each layer.

    Args:
        module: the attention module, which knows its ``layer_idx``.
        query: (1, query heads, tokens, head dim).
        key: (1, KV heads, tokens, head dim), as is ``value``.

    Raises:
        RuntimeError: the model was called without a `ForwardContext`.
    """
    if forward_context is None:
        raise RuntimeError("this model was loaded for the engine; call it through ModelRunner")
    layer: int = module.layer_idx  # type: ignore[assignment]
    context = forward_context
    context.cache.write(
        layer, context.batch.slots, key[0].transpose(0, 1), value[0].transpose(0, 1)
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = context.backend.attend(layer, query[0], context.cache, context.batch, scale)
    return output.unsqueeze(0), None


def _dense_attention(*arguments: Any, **named: Any) -> tuple[torch.Tensor, None]:
    """Return the result of `paged_attention` with strides that follow from its shape alone.

    Compiled code depends on strides, and torch allows any stride for a dimension of one element.
    """
    output, _ = paged_attention(*arguments, **named)
    return output.contiguous().view(-1).view(output.shape), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)
AttentionInterface.register(APART, paged_attention)


def set_apart() -> None:
    """Let ``torch.compile`` leave attention out of the code of models loaded with `APART`.

    This is no part of the import, because it loads the compiler, which takes a second and memory.
    """
    apart = torch.compiler.disable(_dense_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(APART, apart)
