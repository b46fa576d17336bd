"""Stage 5: what runs batches: attention, KV cache, compiled layers and captured shapes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pla_serve.engine.attention.choose import CAPTURABLE, choose_backend
from pla_serve.engine.attention.interface import AttentionBackend
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.build.device import RankDevice
from pla_serve.engine.build.memory import RankMemory
from pla_serve.engine.build.model import RankModel
from pla_serve.engine.build.settings import RankSettings
from pla_serve.engine.build.shapes import build_shapes
from pla_serve.engine.device.capture import CudaCapture
from pla_serve.engine.kv.cache import KVCache
from pla_serve.engine.run.executor import BatchExecutor, Executor
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.policy.shapes.ladder import Shape

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Execution:
    """One rank's executor, and the KV cache that it writes to."""

    runner: ModelRunner
    executor: Executor
    cache: KVCache
    shapes: tuple[Shape, ...]
    """Shapes that were captured at start."""


def build_execution(
    settings: RankSettings, model: RankModel, memory: RankMemory, device: RankDevice
) -> Execution:
    """Choose the attention backend, allocate the KV cache, compile layers and capture shapes.

    Raises:
        ValueError: the settings ask for what does not work on this device. Says what to change.
    """
    config = settings.config
    name, backend = _choose_attention(settings, model)
    cache = KVCache(model.kv_shape, memory.slots, settings.device)
    runner = ModelRunner(model.module, model.layers, cache, backend, device.run_ahead)
    counts = GridCounts() if settings.on_cuda or settings.pads or config.compile_layers else None
    executor = BatchExecutor(
        runner, None, device.uploader, device.device, config.block_tokens, counts
    )
    if config.compile_layers and counts is not None:
        # Before shapes are captured: a capture records the kernels that it finds.
        _compile(model.layers, executor, config.block_tokens, counts)
    if counts is None or not settings.pads or not _can_capture(settings, model, name):
        return Execution(runner, executor, cache, ())
    grid = build_shapes(settings, memory, device, runner, counts)
    executor = BatchExecutor(
        runner, grid, device.uploader, device.device, config.block_tokens, counts
    )
    return Execution(runner, executor, cache, grid.shapes)


def _choose_attention(settings: RankSettings, model: RankModel) -> tuple[str, AttentionBackend]:
    """Return the attention backend that works on this device, and its name."""
    name, backend = choose_backend(
        settings.config.attention_backend,
        model.kv_shape,
        model.query_heads,
        settings.config.block_tokens,
        settings.device,
        model.kernels,
        CudaCapture(settings.device) if settings.on_cuda and settings.pads else None,
        model.windows,
    )
    if settings.pads and not settings.on_cuda:
        return name, PaddedAttention(backend)  # it loops over the spans of real sequences
    return name, backend


def _can_capture(settings: RankSettings, model: RankModel, backend: str) -> bool:
    """Return whether graphs can be captured of this model, and log why not.

    Raises:
        ValueError: shapes were asked for and cannot be captured.
    """
    if not settings.on_cuda:
        return True
    if backend not in CAPTURABLE:
        reason = f"the attention backend {backend} reads lengths on the host, and graphs cannot"
    elif model.experts:
        reason = "which experts are multiplied depends on the tokens, and in a graph it cannot"
    else:
        return True
    if settings.config.capture_shapes is not None:
        raise ValueError(f"no shapes can be captured: {reason}; drop --capture-shapes")
    log.warning("no shapes are captured: %s", reason)
    return False


def _compile(
    layers: torch.nn.ModuleList, executor: Executor, block_tokens: int, counts: GridCounts
) -> None:
    """Run the decoder layers through ``torch.compile``. The log says whether they are used."""
    from pla_serve.engine.run.compiled import compile_layers  # loads torch's compiler

    started = time.perf_counter()

    def run(requests: Sequence[SpanRequest]) -> torch.Tensor:
        return executor.forward(requests, lambda: None).logits

    if compile_layers(layers, run, block_tokens, counts):
        log.info("compiled decoder layers in %.1f s", time.perf_counter() - started)
