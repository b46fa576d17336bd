"""Stage 1: the settings of one rank, and the device and type that it computes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pla_serve.engine.config import NO_SHAPES, EngineConfig
from pla_serve.engine.loading import ModelSource, resolve_device, resolve_dtype
from pla_serve.engine.parallel.ranks import ALONE, Ranks
from pla_serve.environment import usable_cores

STARTS_THREADS = 2**20
"""Elements of an operation for which torch starts its threads."""


@dataclass(frozen=True, slots=True)
class RankSettings:
    """Inputs of all later stages. Two ranks of one engine differ in ``device`` and ``ranks``."""

    config: EngineConfig
    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    """Type of weights, activations and KV."""
    clock: Callable[[], float]
    """Monotonic seconds, for measurements."""
    ranks: Ranks
    """This rank among those that share the model."""

    @property
    def on_cuda(self) -> bool:
        """Whether the model runs on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def pads(self) -> bool:
        """Whether batches may be padded to fixed shapes: by default on CUDA only."""
        if self.config.capture_shapes is None:
            return self.on_cuda
        return self.config.capture_shapes != NO_SHAPES


def build_settings(
    config: EngineConfig,
    source: ModelSource,
    device: torch.device,
    clock: Callable[[], float],
    ranks: Ranks = ALONE,
) -> RankSettings:
    """Choose the dtype and refuse settings that do not fit each other or the device.

    Raises:
        ValueError: a flag does not work here. The message names the flag to drop.
    """
    if config.kv_transfer and device.type != "cpu":
        # Layers are announced when they are enqueued. On a GPU that is before they are computed.
        raise ValueError(f"--kv-transfer is for CPU instances only, not for {device}; drop it")
    if config.compile_layers and ranks.size > 1:
        raise ValueError("--compile-layers is for one rank; drop it, or --tensor-parallel-size")
    dtype = resolve_dtype(config.dtype, device)
    return RankSettings(config, source, device, dtype, clock, ranks)


def device_of_rank(config: EngineConfig, rank: int) -> torch.device:
    """Return the device of a rank: on CUDA the ranks take devices in order, from the named one on.

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
    """Set torch to this rank's share of the CPU threads of the engine, and have them started."""
    threads = config.threads or usable_cores()
    torch.set_num_threads(max(1, threads // config.tensor_parallel_size))
    torch.zeros(STARTS_THREADS).add_(1)
