"""Sizes of the KV cache: how many blocks fit into memory, and how long a sequence may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from pla_serve.engine.config import EngineConfig
from pla_serve.engine.kv.cache import KVShape

GIB = 1024**3
CPU_SHARE = 0.4
"""Share of the free memory for KV; activations and other processes need the rest."""
CPU_DEFAULT_GIB = 4.0
CUDA_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class KVPlan:
    """Sizes of the KV cache."""

    blocks: int
    short_reserve: int
    """Number of blocks that long prefills may not take."""
    max_model_len: int
    """Most tokens of prompt and output together."""


def plan_kv(
    config: EngineConfig,
    shape: KVShape,
    device: torch.device,
    positions: int,
    least: Callable[[int], int] = int,
) -> KVPlan:
    """Fit the KV cache to the memory that is free now.

    Args:
        shape: KV of one token in this rank's share of the model.
        positions: longest sequence in tokens that the model was made for.
        least: returns the fewest blocks of all ranks, given the number that fit on this one.

    Raises:
        ValueError: the settings do not fit the model or the memory; says what to change.
    """
    wanted = config.max_model_len or positions
    if wanted > positions:
        raise ValueError(f"max_model_len {wanted} exceeds the {positions} positions of this model")
    block_bytes = shape.bytes_per_token * config.block_tokens
    blocks = least(_budget(config, shape, device, wanted) // block_bytes)
    reserve = int(blocks * config.short_kv_reserve)
    longest = (blocks - reserve) * config.block_tokens
    if longest < 2:
        raise ValueError(
            f"there is no room for KV: one block of {config.block_tokens} tokens takes "
            f"{block_bytes / 2**20:.1f} MiB; raise kv_cache_gib or free memory"
        )
    if config.max_model_len is not None and wanted > longest:
        whole = shape.bytes_per_token * config.tensor_parallel_size
        needed = wanted * whole / (1 - config.short_kv_reserve) / GIB
        raise ValueError(
            f"max_model_len {wanted} needs {needed:.2f} GiB of KV, and there is room for {longest} "
            "tokens; lower max_model_len or raise kv_cache_gib"
        )
    return KVPlan(blocks, reserve, min(wanted, longest))


def _budget(config: EngineConfig, shape: KVShape, device: torch.device, longest: int) -> int:
    """Return the bytes for this rank's KV; on a CPU all ranks share one memory."""
    ranks = config.tensor_parallel_size
    if config.kv_cache_gib is not None:
        return int(config.kv_cache_gib * GIB) // ranks
    if device.type == "cuda":
        # The allocator still keeps the memory of stock layers that were fused since. With a large
        # model that is half of the device.
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0] * CUDA_SHARE)
    free: int = psutil.virtual_memory().available // ranks
    one = int(longest * shape.bytes_per_token * 1.1)
    return min(int(free * CPU_SHARE), max(int(CPU_DEFAULT_GIB * GIB) // ranks, one))
