"""Where a batch runs: as a whole on a captured shape, or layer by layer on the ordinary kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pla_serve.engine.batch.flat import FlatBatch, SpanRequest, build
from pla_serve.engine.batch.staging import Scratch, Uploader, capacity_of, pack, put_carried, unpack
from pla_serve.engine.run.device import Device, HostDevice
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.engine.run.graphs.grid import ShapeGrid
from pla_serve.engine.run.runner import AtBoundary, ModelRunner


@dataclass(frozen=True, slots=True)
class Executed:
    """A batch whose work has been enqueued."""

    logits: torch.Tensor
    whole: bool
    """It had no layer boundaries, so the host may turn to other things before it is done."""


class Executor(Protocol):
    """Runs batches."""

    device: Device
    carries: bool
    """Whether it takes tokens that the host does not know yet."""

    def forward(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None = None,
    ) -> Executed:
        """Enqueue the pass. See `ModelRunner.forward`; what ``at_boundary`` raises comes out.

        Args:
            carried: (rows,) int64 on the device, for requests that name a row of it. Only where it
                ``carries``.
        """
        ...

    def use_idle_time(self) -> bool:
        """Do a piece of work that waits for a quiet moment; False if there is none."""
        ...

    def counts(self) -> GridCounts | None:
        """What captured shapes and compiled layers did so far; None where there are none."""
        ...


class PlainExecutor:
    """Every batch layer by layer, laid out for backends that go by spans.

    Args:
        counts: what `counts` gives.
    """

    carries = False

    def __init__(
        self,
        runner: ModelRunner,
        block_tokens: int,
        device: torch.device,
        counts: GridCounts | None = None,
    ) -> None:
        self.device: Device = HostDevice()
        self._runner = runner
        self._block_tokens = block_tokens
        self._torch_device = device
        self._counts = counts

    @torch.inference_mode()
    def forward(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None = None,
    ) -> Executed:
        """See `Executor`."""
        assert carried is None
        flat = build(requests, self._block_tokens, self._torch_device)
        return Executed(self._runner.forward(flat, at_boundary), False)

    def use_idle_time(self) -> bool:
        """See `Executor`."""
        return False

    def counts(self) -> GridCounts | None:
        """See `Executor`."""
        return self._counts


class StagedExecutor:
    """Batches reach the device in one copy; small ones run on captured shapes.

    Args:
        grid: None captures nothing.
        counts: those of the grid, if there is one.
    """

    carries = True

    def __init__(
        self,
        runner: ModelRunner,
        grid: ShapeGrid | None,
        uploader: Uploader,
        device: Device,
        block_tokens: int,
        counts: GridCounts | None = None,
    ) -> None:
        self.device = device
        self._runner = runner
        self._grid = grid
        self._uploader = uploader
        self._block_tokens = block_tokens
        self._counts = counts if grid is None else grid.counts

    @torch.inference_mode()
    def forward(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None = None,
    ) -> Executed:
        """See `Executor`."""
        if self._grid is not None:
            logits = self._grid.forward(requests, carried)
            if logits is not None:
                return Executed(logits, True)
        flat = stage(requests, self._block_tokens, self._uploader, carried)
        return Executed(self._runner.forward(flat, at_boundary), False)

    def use_idle_time(self) -> bool:
        """See `Executor`: captures a shape that was often missed."""
        return self._grid is not None and self._grid.capture_hot()

    def counts(self) -> GridCounts | None:
        """See `Executor`."""
        return self._counts


def stage(
    requests: Sequence[SpanRequest],
    block_tokens: int,
    uploader: Uploader,
    carried: torch.Tensor | None = None,
) -> FlatBatch:
    """A batch without padding, on the device; ``carried`` as of `Executor.forward`."""
    capacity = capacity_of(requests, block_tokens)
    numbers, spans = pack(requests, capacity, block_tokens, Scratch(0, 1))
    buffer = uploader.upload(numbers, None)
    if carried is not None:
        put_carried(buffer, capacity, carried)
    return unpack(
        buffer,
        capacity,
        spans,
        block_tokens,
        most_query=max(span.length for span in spans),
        most_context=max(span.history + span.length for span in spans),
    )
