"""How stock model code reaches our attention: one function registered with transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from pla_serve.engine.attention.cache import KVCache
from pla_serve.engine.batch.flat import FlatBatch

IMPLEMENTATION = "pla_serve_paged"
"""Value of ``attn_implementation`` for models that the engine runs.

No mask function is registered under this name, so transformers builds no masks.
"""

APART = "pla_serve_paged_apart"
"""The same for models whose layers are compiled: attention is not part of what is compiled."""


class AttentionBackend(Protocol):
    """Attends the new tokens of a flat batch to their own contexts, causally."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        cache: KVCache,
        batch: FlatBatch,
        scaling: float,
    ) -> torch.Tensor:
        """``query`` is (query heads, tokens, head dim); the result (tokens, query heads, head dim).

        The KV of the new tokens is in the cache already.
        """
        ...


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Travels with a forward call through the model's keyword arguments."""

    batch: FlatBatch
    cache: KVCache
    backend: AttentionBackend


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
    """The function that attention modules call; shapes (1, heads, tokens, head dim)."""
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
    """``paged_attention`` with strides that shapes alone determine: compiled code depends on them,
    and those of a dimension of one element may be anything."""
    output, _ = paged_attention(*arguments, **named)
    return output.contiguous().view(-1).view(output.shape), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)
AttentionInterface.register(APART, paged_attention)


def set_apart() -> None:
    """Have ``torch.compile`` leave attention alone in models loaded with `APART`.

    Not done on import: it loads the compiler, which takes a second and memory.
    """
    apart = torch.compiler.disable(_dense_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(APART, apart)
