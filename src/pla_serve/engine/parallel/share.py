"""Divides models over ranks: which can be divided, and the sizes of one rank's share."""

from __future__ import annotations

import copy
from dataclasses import replace

from transformers import PreTrainedConfig

from pla_serve.engine.loading import AttentionShape, UnsupportedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose weights we know how to divide."""
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


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
    for name in DIVIDED:
        number = int(getattr(config, name))
        if number % size:
            possible = [str(n) for n in range(1, size) if _divides(config, n)]
            raise UnsupportedModel(
                f"{name} is {number} in this model, which {size} ranks cannot share evenly; "
                f"--tensor-parallel-size {' or '.join(possible)} can"
            )


def _divides(config: PreTrainedConfig, size: int) -> bool:
    return all(int(getattr(config, name)) % size == 0 for name in DIVIDED)


def share_of_config(config: PreTrainedConfig, attention: AttentionShape, size: int) -> object:
    """Return the config of a model whose layers have the size of one rank's share."""
    share = copy.deepcopy(config)
    share.head_dim = attention.head_dim  # otherwise it would follow from the number of heads
    for name in DIVIDED:
        setattr(share, name, int(getattr(config, name)) // size)
    return share


def share_of_heads(attention: AttentionShape, size: int) -> AttentionShape:
    """Return the heads of one rank; a KV head stays with the query heads that read it."""
    return replace(
        attention,
        query_heads=attention.query_heads // size,
        kv_heads=attention.kv_heads // size,
    )
