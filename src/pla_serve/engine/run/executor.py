"""Runs batches: on a captured shape if one fits, else layer by layer on the ordinary kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import Uploader, stage
from pla_serve.engine.device.marks import Device
from pla_serve.engine.kv.system_memory import return_freed_memory
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.engine.run.graphs.grid import ShapeGrid
from pla_serve.engine.run.pooling import HiddenSum, pool_spans
from pla_serve.engine.run.runner import AtBoundary, ModelRunner
from pla_serve.engine.run.scoring import Scoring, score_spans


@dataclass(frozen=True, slots=True)
class Executed:
    """Result of a forward pass whose work has been enqueued on the device."""

    logits: torch.Tensor
    """(rows, vocabulary): one row for each request that wants logits, in order."""
    whole: bool
    """True if the batch ran as one captured graph, without layer boundaries. The device may then
    still have all of it to do."""
    scoring: Scoring | None = None
    """Log probabilities of prompts; None if no request reads its prompt."""
    pooled: Sequence[HiddenSum | None] | None = None
    """Sums of hidden states, one for each request that asked for them; None as for ``scoring``."""


class Executor(Protocol):
    """Runs batches on a device."""

    device: Device
    carries: bool
    """Whether `forward` takes tokens that only the device knows so far."""

    def forward(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None = None,
    ) -> Executed:
        """Enqueue one forward pass.

        Args:
            at_boundary: called before each decoder layer, and before each slice of scores. It may
                call `forward` for other batches. An exception that it raises leaves the pass and
                is raised from here.
            carried: (rows,) int64 on the device: tokens that requests name by their row. None
                unless the executor ``carries``.
        """
        ...

    def end_warm_up(self) -> None:
        """Give back memory that the batches of a warm-up took. No request may be running."""
        ...

    def use_idle_time(self) -> bool:
        """Do one piece of work that was put off until the engine is idle.

        Returns False if there is none.
        """
        ...

    def counts(self) -> GridCounts | None:
        """Return counters of captured shapes and compiled layers, or None if neither is in use."""
        ...


class BatchExecutor:
    """Copies each batch to the device in one transfer and runs it.

    Args:
        grid: captured shapes, or None to run every batch layer by layer.
        counts: counters for an executor without a grid. A grid has its own.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device = device
        self._clock = clock
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
        if any(request.scores is not None or request.pooled is not None for request in requests):
            return self._read(requests, at_boundary, carried)
        if self._grid is not None:
            logits = self._grid.forward(requests, carried)
            if logits is not None:
                return Executed(logits, True)
        batch = stage(requests, self._block_tokens, self._uploader, carried)
        return Executed(self._runner.forward(batch, at_boundary), False)

    def _read(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None,
    ) -> Executed:
        """Run a batch layer by layer, and score or pool its last hidden states."""
        batch = stage(requests, self._block_tokens, self._uploader, carried)
        hidden = self._runner.hidden(batch, at_boundary)
        logits = self._runner.logits(hidden[batch.outputs])
        self.device.record().wait()  # the time of the layers does not count as that of scoring
        scoring = score_spans(
            requests, batch.spans, hidden, self._runner.logits, at_boundary, self._clock
        )
        return Executed(logits, False, scoring, pool_spans(requests, batch.spans, hidden))

    def end_warm_up(self) -> None:
        """See `Executor`: on a CPU that is their KV, and freed activations."""
        self._runner.forget_kv()
        return_freed_memory()

    def use_idle_time(self) -> bool:
        """See `Executor`: makes KV memory ready, or captures a shape that batches often missed."""
        if self._runner.use_idle_time():
            return True
        return self._grid is not None and self._grid.capture_hot()

    def counts(self) -> GridCounts | None:
        """See `Executor`."""
        return self._counts
