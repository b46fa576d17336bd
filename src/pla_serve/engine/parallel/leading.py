"""The executor of rank 0, which makes the other ranks run the same batches layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.device.marks import Device
from pla_serve.engine.parallel.commands import (
    Abandon,
    BeginPass,
    EndWarmUp,
    Go,
    SendCommand,
    UseIdleTime,
)
from pla_serve.engine.run.executor import Executed, Executor
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.engine.run.runner import AtBoundary


class LeadingExecutor:
    """Wraps the executor of rank 0 and sends commands to the other ranks.

    The products of a layer are summed over the ranks, so all ranks have to enter the same layers of
    the same batches in the same order. The loop decides at layer boundaries of rank 0. The other
    ranks get each decision before rank 0 computes the layer, so that all compute at the same time.
    """

    carries = False
    """Whether tokens may stay on the device: not here, because other ranks do not have them."""

    def __init__(self, executor: Executor, send: SendCommand) -> None:
        self.device: Device = executor.device
        self._executor = executor
        self._send = send
        self._depth = 0

    def forward(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None = None,
    ) -> Executed:
        """See `Executor`; without ``carried``."""
        assert carried is None
        depth = self._depth
        layer = 0

        def decide() -> None:
            nonlocal layer
            at_boundary()
            self._send(Go(depth, layer))
            layer += 1

        self._send(BeginPass.of(depth, requests))
        self._depth = depth + 1
        try:
            return self._executor.forward(requests, decide)
        except BaseException:
            self._send(Abandon(depth))
            raise
        finally:
            self._depth = depth

    def end_warm_up(self) -> None:
        """See `Executor`."""
        self._send(EndWarmUp())
        self._executor.end_warm_up()

    def use_idle_time(self) -> bool:
        """See `Executor`."""
        self._send(UseIdleTime())
        return self._executor.use_idle_time()

    def counts(self) -> GridCounts | None:
        """See `Executor`."""
        return self._executor.counts()
