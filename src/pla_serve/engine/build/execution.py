"""Puts together what executes batches on a device: KV memory, attention, run-ahead, shapes."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress

from pla_serve.engine.attention.cache import KVCache, KVShape
from pla_serve.engine.attention.choose import CAPTURABLE, choose_backend
from pla_serve.engine.attention.interface import AttentionBackend
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.attention.sdpa import SdpaCpu
from pla_serve.engine.config import NO_SHAPES, EngineConfig
from pla_serve.engine.run.device import Device, RunAhead, device_of
from pla_serve.engine.run.executor import Executor, PlainExecutor, StagedExecutor
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.run.graphs.agreed import AgreedCapture
from pla_serve.engine.run.graphs.capture import Capturer, CudaCapture, NoCapture
from pla_serve.engine.run.graphs.choice import AUTO, choose_shapes
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.engine.run.graphs.grid import GridLimits, ShapeGrid
from pla_serve.engine.kv.sizing import GIB, KVPlan
from pla_serve.engine.loading.support import AttentionShape
from pla_serve.engine.parallel.ranks import ALONE, Ranks
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.engine.batch.staging import DirectUploader, PinnedUploader, Scratch, Uploader
from pla_serve.engine.layers.amx import Tiles
from pla_serve.policy.cost import CostModel
from pla_serve.policy.shapes.ladder import Shape

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Execution:
    """What runs batches."""

    runner: ModelRunner
    executor: Executor
    cache: KVCache
    shapes: tuple[Shape, ...] = ()
    """Captured at start."""

    def run(self, requests: Sequence[SpanRequest]) -> object:
        """One batch, as the loop would have it run; for warm-ups."""
        return self.executor.forward(requests, lambda: None)


def make_execution(
    config: EngineConfig,
    model: torch.nn.Module,
    layers: torch.nn.ModuleList,
    shape: KVShape,
    attention: AttentionShape,
    plan: KVPlan,
    cost: CostModel,
    device: torch.device,
    tiles: Tiles | None,
    *,
    ranks: Ranks = ALONE,
) -> Execution:
    """Allocates the KV, chooses the attention and captures shapes.

    Args:
        tiles: a CPU's matrix unit, for attention in float32; None if it has none.

    Raises:
        ValueError: what was asked for does not work on this device; says what to change.
    """
    block = config.block_tokens
    cuda = device.type == "cuda"
    capturer = CudaCapture(device) if cuda and config.capture_shapes != NO_SHAPES else None
    name, backend = choose_backend(
        config.attention_backend, shape, attention.query_heads, block, device, tiles, capturer
    )
    if not cuda and config.capture_shapes in (None, NO_SHAPES):
        cache = KVCache(shape, plan.blocks * block, device)
        runner = ModelRunner(model, layers, cache, backend)
        counts = GridCounts() if config.compile_layers else None
        plain = PlainExecutor(runner, block, device, counts)
        _compile(config, layers, plain)
        return Execution(runner, plain, cache)
    tracker = device_of(device)
    uploader: Uploader = PinnedUploader(tracker) if cuda else DirectUploader()
    scratch = Scratch(plan.blocks * block, block)
    cache = KVCache(shape, scratch.first + scratch.count, device)
    ahead = RunAhead(tracker, config.run_ahead_layers) if tracker.asynchronous else None
    runner = ModelRunner(model, layers, cache, _padding(backend), ahead)
    limits = GridLimits(
        block_tokens=block,
        scratch=scratch,
        most_context=plan.max_model_len,
        most_tokens=min(config.capture_tokens, config.policy_config.max_batch_tokens),
        padding_cap=config.capture_padding_cap,
    )
    counts = GridCounts()
    # Before anything is captured: a capture takes the kernels that it finds.
    _compile(config, layers, StagedExecutor(runner, None, uploader, tracker, block, counts))
    grid = None
    if config.capture_shapes == NO_SHAPES:
        pass
    elif not cuda or name in CAPTURABLE:
        grid = make_grid(config, runner, cost, limits, uploader, tracker, counts, ranks=ranks)
    else:
        reason = f"the attention backend {name} reads lengths on the host, and graphs cannot"
        if config.capture_shapes is not None:
            raise ValueError(f"no shapes can be captured: {reason}; drop --capture-shapes")
        log.warning("no shapes are captured: %s", reason)
    shapes = () if grid is None else grid.shapes
    executor = StagedExecutor(runner, grid, uploader, tracker, block, counts)
    return Execution(runner, executor, cache, shapes)


def _compile(config: EngineConfig, layers: torch.nn.ModuleList, executor: Executor) -> None:
    """Have the layers compiled, if that was asked for; what comes of it is in the log."""
    counts = executor.counts()
    if not config.compile_layers or counts is None:
        return
    from pla_serve.engine.run.compiled import compile_layers  # loads torch's compiler

    started = time.perf_counter()

    def run(requests: Sequence[SpanRequest]) -> torch.Tensor:
        return executor.forward(requests, lambda: None).logits

    if compile_layers(layers, run, config.block_tokens, counts):
        log.info("compiled decoder layers in %.1f s", time.perf_counter() - started)


def make_grid(
    config: EngineConfig,
    runner: ModelRunner,
    cost: CostModel,
    limits: GridLimits,
    uploader: Uploader,
    tracker: Device,
    counts: GridCounts | None = None,
    *,
    ranks: Ranks = ALONE,
) -> ShapeGrid:
    """The captured shapes, with a bar on a terminal, and what they took in the log."""
    device = tracker.torch_device

    def price(tokens: int, batch: int) -> float:
        return cost.work_seconds(tokens, 0.0, tokens, batch, 1)

    shapes = choose_shapes(
        config.capture_shapes or AUTO,
        most_tokens=limits.most_tokens,
        most_batch=config.policy_config.max_batch_requests,
        cost=price,
    )
    capturer: Capturer = CudaCapture(device) if device.type == "cuda" else NoCapture()
    if ranks.size > 1:
        capturer = AgreedCapture(capturer, ranks)
    grid = ShapeGrid(runner, capturer, uploader, shapes, price, limits, device, counts)
    started = time.perf_counter()
    console = Console(stderr=True)
    hidden = not (console.is_terminal and ranks.leads)
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("Capturing shapes", total=len(shapes))

        def tell(shape: Shape, number: int, count: int) -> None:
            progress.update(task, completed=number, description=f"{shape.tokens}x{shape.batch}")

        with _quick_collections():
            grid.capture_all(tell)
    log.info(
        "captured %d shapes up to %d tokens in %.1f s, %.2f GiB",
        len(grid.shapes),
        max((shape.tokens for shape in grid.shapes), default=0),
        time.perf_counter() - started,
        grid.bytes_held() / GIB,
    )
    return grid


@contextmanager
def _quick_collections() -> Iterator[None]:
    """A capture collects garbage first; what is there by now need not be looked at each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _padding(backend: AttentionBackend) -> AttentionBackend:
    """Backends that go by spans see real tokens only."""
    return PaddedAttention(backend) if isinstance(backend, SdpaCpu) else backend
