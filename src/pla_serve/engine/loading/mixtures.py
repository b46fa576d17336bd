"""Mixtures of experts: which families are served, and what their stock modules hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

FAMILIES = frozenset(
    {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared"}
)
"""Model types whose tokens choose their experts each by itself, and that are tested."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Fields of configs that hold the number of experts."""


def expert_count(config: PreTrainedConfig) -> int:
    """Return the number of experts of each layer that has them; 0 for dense models.

    One expert alone counts in the families that are served; elsewhere it is a dense model.
    """
    counts = [getattr(config, name, None) for name in COUNTS]
    most = max((count for count in counts if isinstance(count, int)), default=0)
    return most if most > 1 or config.model_type in FAMILIES else 0


def is_experts(module: nn.Module) -> bool:
    """Whether a module is what transformers calls ``experts``: the MLPs of all of a layer."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "num_experts")


def chosen_share(config: PreTrainedConfig) -> float:
    """Return which share of the experts of a layer a token passes through; 1 for dense models."""
    experts = expert_count(config)
    return int(config.num_experts_per_tok) / experts if experts else 1.0


def linears_of(experts: Any) -> list[tuple[nn.Linear, nn.Linear, nn.Linear]]:
    """Return the linears of each expert, on the weights that the stock module holds.

    They make the gate, what is gated, and the output of ``down(silu(gate(x)) * up(x))``.

    Raises:
        TypeError: the experts have another form, such as biases or a gate of their own.
    """
    plain = experts.has_gate and experts.is_concatenated and not experts.is_transposed
    if not plain or experts.has_bias or experts.has_post_expert_norm:
        raise TypeError(f"{type(experts).__name__} has experts of another form")
    return list(_linears(experts.gate_up_proj.data, experts.down_proj.data))


def _linears(
    gate_up: torch.Tensor, down: torch.Tensor
) -> Iterator[tuple[nn.Linear, nn.Linear, nn.Linear]]:
    for first, last in zip(gate_up, down, strict=True):
        gate, up = first.chunk(2)
        yield _linear(gate), _linear(up), _linear(last)


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(1, 1, bias=False, device="meta")
    made.out_features, made.in_features = weight.shape
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made
