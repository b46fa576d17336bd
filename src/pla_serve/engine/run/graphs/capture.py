"""Turns a function on fixed tensors into something that can be played again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

FixedPass = Callable[[], torch.Tensor]
"""Reads its inputs from tensors that stay where they are; gives the logits."""


class WarmUpFailed(RuntimeError):
    """A pass before the capture failed, maybe in the middle of a sum with other ranks."""


class Capturer(Protocol):
    """How a shape is made replayable."""

    def capture(self, run: FixedPass) -> FixedPass:
        """``run``, which has never run before, as something to be called for each batch."""
        ...

    def bytes_held(self) -> int:
        """Device memory that all captures so far keep."""
        ...


class NoCapture:
    """Runs the static pass as it is: the same shapes, padding and buffers on any device."""

    def capture(self, run: FixedPass) -> FixedPass:
        """See `Capturer`."""
        return run

    def bytes_held(self) -> int:
        """See `Capturer`."""
        return 0


class CudaCapture:
    """CUDA graphs that share one memory pool.

    Only one of them runs at a time, and each one's results are read before the next is played, so
    they may use the same memory. Captured from the largest on, each finds room in what the ones
    before it have taken.
    """

    WARM_UPS = 2
    """Passes before the capture: kernels are compiled and libraries make their workspaces."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._held = 0

    def capture(self, run: FixedPass) -> FixedPass:
        """See `Capturer`."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(self.WARM_UPS):
                    run()
        except RuntimeError as error:
            raise WarmUpFailed(str(error)) from error
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self._device)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = run()
        torch.cuda.synchronize(self._device)
        self._held += max(0, free - torch.cuda.mem_get_info(self._device)[0])

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    def bytes_held(self) -> int:
        """See `Capturer`."""
        return self._held
