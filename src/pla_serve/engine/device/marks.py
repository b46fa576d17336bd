"""Marks in a device's stream of work, by which the host follows its progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch


class DeviceMark(Protocol):
    """Point in the device's stream of work."""

    def done(self) -> bool:
        """Return whether all work before the mark has finished. Never waits."""
        ...

    def wait(self) -> None:
        """Wait until all work before the mark has finished."""
        ...

    def seconds_since(self, earlier: DeviceMark) -> float | None:
        """Return the device time between two marks that are done, or None if it keeps no time."""
        ...


class Device(Protocol):
    """Device with one stream of work, which runs in the order in which it was enqueued."""

    torch_device: torch.device
    asynchronous: bool
    """Whether calls return before the work that they enqueue is done."""

    def record(self) -> DeviceMark:
        """Return a mark after all work that has been enqueued so far."""
        ...


class _Finished:
    """Mark on a device that has finished all work whenever a call returns."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: DeviceMark) -> float | None:
        return None


class HostDevice:
    """CPU, which has done the work of a call when the call returns."""

    asynchronous = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._finished = _Finished()

    def record(self) -> DeviceMark:
        """See `Device`."""
        return self._finished


class _CudaMark:
    """CUDA event in a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def done(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        self._event.synchronize()

    def seconds_since(self, earlier: DeviceMark) -> float | None:
        if not isinstance(earlier, _CudaMark):
            return None
        return float(earlier._event.elapsed_time(self._event)) / 1000


class CudaDevice:
    """CUDA device, with its current stream."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device

    def record(self) -> DeviceMark:
        """See `Device`."""
        return _CudaMark(torch.cuda.current_stream(self.torch_device))


def device_of(device: torch.device) -> Device:
    """Return what records marks on a torch device."""
    return CudaDevice(device) if device.type == "cuda" else HostDevice()


class RunAhead:
    """Bounds the number of layers that the host has enqueued and the device has not finished.

    Without a bound, a host that enqueues the layers of a long prefill in a millisecond each would
    have enqueued all of them before the first is done, and nothing would be left to preempt. With a
    depth of 1 the device would idle while the host enqueues. With 2 it runs one layer meanwhile.

    Args:
        depth: most unfinished layers once the next one is enqueued, at least 1.

    Raises:
        ValueError: ``depth`` is less than 1.
    """

    def __init__(self, device: Device, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"the host must be allowed at least 1 layer ahead, not {depth}")
        self._device = device
        self._depth = depth
        self._marks: deque[DeviceMark] = deque()
        self._held = 0

    def before_layer(self, ask: Callable[[], None]) -> None:
        """Wait until the next layer may be enqueued, and call ``ask``, which may run other passes.

        ``ask`` is called when fewer than ``depth`` of the enqueued layers are unfinished, and the
        same holds when this returns.
        """
        if not self._device.asynchronous:
            ask()
            return
        self._hold()
        held = self._held
        ask()
        if self._held != held:  # layers of other passes have been enqueued meanwhile
            self._hold()

    def _hold(self) -> None:
        """Mark the end of the last layer and of passes after it, and wait for an earlier mark."""
        self._held += 1
        self._marks.append(self._device.record())
        while len(self._marks) >= self._depth:
            self._marks.popleft().wait()
