"""Part of stage 5: the shapes that are captured at start."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from pla_serve.engine.build.device import RankDevice
from pla_serve.engine.build.memory import RankMemory
from pla_serve.engine.build.settings import RankSettings
from pla_serve.engine.device.capture import Capturer, CudaCapture, NoCapture
from pla_serve.engine.kv.sizing import GIB
from pla_serve.engine.parallel.agreed import AgreedCapture
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.engine.run.graphs.grid import GridLimits, ShapeGrid
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.policy.shapes.choice import AUTO, choose_shapes
from pla_serve.policy.shapes.ladder import Shape

log = logging.getLogger(__name__)


def build_shapes(
    settings: RankSettings,
    memory: RankMemory,
    device: RankDevice,
    runner: ModelRunner,
    counts: GridCounts,
) -> ShapeGrid:
    """Choose the shapes by ``--capture-shapes`` and capture them.

    Raises:
        ValueError: a shape that was named is larger than any batch.
    """
    config = settings.config
    assert memory.scratch is not None
    limits = GridLimits(
        block_tokens=config.block_tokens,
        scratch=memory.scratch,
        most_context=memory.plan.max_model_len,
        most_tokens=min(config.capture_tokens, config.policy_config.max_batch_tokens),
        padding_cap=config.capture_padding_cap,
    )
    shapes = choose_shapes(
        config.capture_shapes or AUTO,
        most_tokens=limits.most_tokens,
        most_batch=config.policy_config.max_batch_requests,
        cost=device.capture_seconds,
    )
    capturer: Capturer = CudaCapture(settings.device) if settings.on_cuda else NoCapture()
    if settings.ranks.size > 1:
        settings.ranks.before_leaving(capturer.release)
        capturer = AgreedCapture(capturer, settings.ranks)
    grid = ShapeGrid(
        runner,
        capturer,
        device.uploader,
        shapes,
        device.capture_seconds,
        limits,
        device.device.torch_device,
        counts,
    )
    capture_all(grid, len(shapes), quiet=not settings.ranks.leads)
    return grid


def capture_all(grid: ShapeGrid, count: int, *, quiet: bool = False) -> None:
    """Capture the shapes of ``grid`` with a progress bar on a terminal, and log the time taken.

    Args:
        count: number of shapes, for the bar.
        quiet: show no bar.
    """
    started = time.perf_counter()
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("Capturing shapes", total=count)

        def show(shape: Shape, number: int, count: int) -> None:
            progress.update(task, completed=number, description=f"{shape.tokens}x{shape.batch}")

        with _quick_collections():
            grid.capture_all(show)
    log.info(
        "captured %d shapes up to %d tokens in %.1f s, %.2f GiB",
        len(grid.shapes),
        max((shape.tokens for shape in grid.shapes), default=0),
        time.perf_counter() - started,
        grid.bytes_held() / GIB,
    )


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Exempt existing objects from garbage collection, which each capture starts with."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
