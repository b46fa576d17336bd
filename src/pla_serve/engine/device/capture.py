"""Captures a function on fixed tensors, to be replayed again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

FixedPass = Callable[[], torch.Tensor]
"""Pass that reads its inputs from tensors at fixed addresses, and returns the logits."""


class WarmUpFailed(RuntimeError):
    """Raised when a pass before the capture fails, maybe in the middle of a sum over ranks."""


class Capturer(Protocol):
    """Makes passes replayable."""

    def capture(self, run: FixedPass) -> FixedPass:
        """Return a replayable form of ``run``, which has never run before.

        Raises:
            RuntimeError: the pass cannot be captured.
        """
        ...

    def bytes_held(self) -> int:
        """Return the bytes of device memory that all captures so far keep."""
        ...

    def release(self) -> None:
        """Give up all captures, which nobody may replay any more."""
        ...


class NoCapture:
    """Runs the fixed pass uncaptured, with the same shapes, padding and buffers, on any device."""

    def capture(self, run: FixedPass) -> FixedPass:
        """See `Capturer`."""
        return run

    def bytes_held(self) -> int:
        """See `Capturer`."""
        return 0

    def release(self) -> None:
        """See `Capturer`."""


class CudaCapture:
    """Captures CUDA graphs that share one memory pool.

    One graph runs at a time, and its results are read before the next one is replayed, so all of
    them may use the same memory. When shapes are captured from the largest on, each graph finds
    room in the memory of those before it.
    """

    WARM_UPS = 2
    """Passes before the capture, in which kernels are compiled and libraries make workspaces."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._held = 0
        self._graphs: list[torch.cuda.CUDAGraph] = []

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
        self._graphs.append(graph)
        self._held += max(0, free - torch.cuda.mem_get_info(self._device)[0])

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay

    def bytes_held(self) -> int:
        """See `Capturer`."""
        return self._held

    def release(self) -> None:
        """See `Capturer`."""
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
