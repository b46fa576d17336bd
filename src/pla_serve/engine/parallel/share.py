"""Divides models over ranks: which can be divided, and the sizes of one rank's share."""

from __future__ import annotations

import copy
from dataclasses import replace

from transformers import PreTrainedConfig

from pla_serve.engine.loading import AttentionShape, UnsupportedModel

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Model types whose weights we know how to divide."""
DIVIDED = (
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
"""Sizes of a layer, in whatever config has them, that are divided over the ranks."""


def check_divides(config: PreTrainedConfig, size: int) -> None:
    """Check that a model can be divided over ``size`` ranks.

    Raises:
        UnsupportedModel: it cannot; the message says why, and which sizes are possible.
    """
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"tensor parallelism is for {', '.join(FAMILIES)}, not for {config.model_type}; leave "
            "out --tensor-parallel-size"
        )
    for name, number in _divided(config).items():
        if number % size:
            possible = [str(n) for n in range(1, size) if _divides(config, n)]
            raise UnsupportedModel(
                f"{name} is {number} in this model, which {size} ranks cannot share evenly; "
                f"--tensor-parallel-size {' or '.join(possible)} can"
            )


def _divides(config: PreTrainedConfig, size: int) -> bool:
    return all(number % size == 0 for number in _divided(config).values())


def _divided(config: PreTrainedConfig) -> dict[str, int]:
    return {name: int(getattr(config, name)) for name in DIVIDED if hasattr(config, name)}


def share_of_config(config: PreTrainedConfig, attention: AttentionShape, size: int) -> object:
    """Return the config of a model whose layers have the size of one rank's share."""
    share = copy.deepcopy(config)
    share.head_dim = attention.head_dim  # otherwise it would follow from the number of heads
    for name, number in _divided(config).items():
        setattr(share, name, number // size)
    return share


def share_of_heads(attention: AttentionShape, size: int) -> AttentionShape:
    """Return the heads of one rank; a KV head stays with the query heads that read it."""
    return replace(
        attention,
        query_heads=attention.query_heads // size,
        kv_heads=attention.kv_heads // size,
    )
