"""One rank's model on its device, with all that runs batches: the same for every rank."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import torch
from torch import nn

from pla_serve.engine.layers import cpu
from pla_serve.engine.layers import gpu
from pla_serve.engine.build.execution import Execution, make_execution
from pla_serve.engine.attention.cache import KVShape
from pla_serve.engine.attention.interface import APART, IMPLEMENTATION
from pla_serve.engine.build.roofline import ModelSize, measure, starting_profile
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.kv.sizing import KVPlan, plan_kv
from pla_serve.engine.loading import (
    AttentionShape,
    ModelSource,
    check_supported,
    decoder_layers,
    load_config,
    load_model,
    most_positions,
    resolve_device,
    resolve_dtype,
)
from pla_serve.engine.parallel.ranks import Ranks, agree, least
from pla_serve.engine.parallel.share import check_divides, share_of_heads
from pla_serve.engine.parallel.weights import load_share
from pla_serve.engine.layers.amx import Tiles
from pla_serve.engine.transfer.layout import fingerprint
from pla_serve.policy.cost import CostModel, CostProfile

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded."""

    execution: Execution
    kv_plan: KVPlan
    cost: CostModel
    dtype: torch.dtype
    layers: int
    kv_bytes_per_token: int
    """Over all layers and ranks."""
    vocab_size: int
    weights: str
    """See `fingerprint`; empty unless KV is exchanged."""


def device_of_rank(config: EngineConfig, rank: int) -> torch.device:
    """Ranks on CUDA take devices in order, from the one that was named on.

    Raises:
        ValueError: there is no such device.
    """
    device = resolve_device(config.device)
    if device.type != "cuda" or config.tensor_parallel_size == 1:
        return device
    first, count = device.index or 0, torch.cuda.device_count()
    if first + config.tensor_parallel_size > count:
        raise ValueError(
            f"--tensor-parallel-size {config.tensor_parallel_size} needs as many CUDA devices from "
            f"cuda:{first} on, and there are {count} in all; lower it"
        )
    return torch.device("cuda", first + rank)


def use_threads(config: EngineConfig) -> None:
    """This rank's share of the CPU threads."""
    torch.set_num_threads(max(1, (config.threads or _cores()) // config.tensor_parallel_size))


def load(
    config: EngineConfig,
    source: ModelSource,
    device: torch.device,
    clock: Callable[[], float],
    ranks: Ranks,
) -> Loaded:
    """Load, choose kernels, allocate the KV and capture shapes; nothing has run yet.

    Raises:
        LoadingError: the model cannot be had, or is not supported.
        ValueError: the settings do not fit the model or the machine.
    """
    dtype = resolve_dtype(config.dtype, device)
    if config.kv_transfer and device.type != "cpu":
        # Layers are announced when they are enqueued, which on a GPU is before they are computed.
        raise ValueError(f"--kv-transfer is for CPU instances only, not for {device}; drop it")
    if config.compile_layers and ranks.size > 1:
        raise ValueError("--compile-layers is for one rank; drop it, or --tensor-parallel-size")
    model_config = load_config(source)
    whole = check_supported(model_config)
    if ranks.size > 1:
        check_divides(model_config, ranks.size)
    attention = share_of_heads(whole, ranks.size)
    shape = KVShape(attention.layers, attention.kv_heads, attention.head_dim, dtype)
    model = _model(config, source, whole, dtype, device, ranks)
    layers = decoder_layers(model, attention.layers)
    size = ModelSize.of(
        model,
        layers,
        attention_width=attention.query_heads * attention.head_dim,
        kv_bytes_per_token=shape.bytes_per_token,
    )
    weights = fingerprint(model) if config.kv_transfer else ""
    tiles = Tiles.open() if device.type == "cpu" and dtype == torch.float32 else None
    if device.type == "cpu":
        fused = cpu.optimise(model, tiles, keep=layers if config.compile_layers else None)
    elif not config.compile_layers:
        fused = gpu.optimise(model, gpu.best_operations())
    if not config.compile_layers:
        log.info("fused %d of %d decoder layers", fused, len(layers))
    positions = most_positions(model_config)
    kv_plan = plan_kv(config, shape, device, positions, lambda blocks: least(ranks, blocks))
    profile = _profile(size, device, dtype, clock, ranks)
    cost = CostModel(profile)
    # The ranks must choose the same captured shapes, so those are not priced by what rank 0 learns.
    prices = cost if ranks.size == 1 else CostModel(profile)
    execution = make_execution(
        config, model, layers, shape, attention, kv_plan, prices, device, tiles, ranks=ranks
    )
    kind = type(execution.executor).__name__
    agree(ranks, f"{kind}, shapes {[tuple(s) for s in execution.shapes]}, {kv_plan}")
    return Loaded(
        execution=execution,
        kv_plan=kv_plan,
        cost=cost,
        dtype=dtype,
        layers=shape.layers,
        kv_bytes_per_token=shape.bytes_per_token * ranks.size,
        vocab_size=int(model_config.vocab_size),
        weights=weights,
    )


def _model(
    config: EngineConfig,
    source: ModelSource,
    attention: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
) -> nn.Module:
    if ranks.size == 1:
        implementation = APART if config.compile_layers else IMPLEMENTATION
        return load_model(
            source, dtype, device, config.seed, attn_implementation=implementation, checked=True
        )
    model = load_share(
        source, attention, dtype, device, config.seed, ranks, attn_implementation=IMPLEMENTATION
    )
    agree(ranks, "loaded")  # a rank that failed is noticed here, which in a sum it might not be
    return model


def _profile(
    size: ModelSize,
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[], float],
    ranks: Ranks,
) -> CostProfile:
    """Rank 0 measures, while the others wait."""
    text = ""
    if ranks.leads:
        measured = starting_profile(size, measure(device, dtype, clock))
        if ranks.size == 1:
            return measured
        text = msgspec.json.encode(measured).decode()
    return msgspec.json.decode(ranks.exchange(text)[0], type=CostProfile)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
