"""What the host knows of the device's progress: marks in its stream of work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch


class DeviceMark(Protocol):
    """A point in the device's stream of work."""

    def done(self) -> bool:
        """Whether all work before it has finished; never waits."""
        ...

    def wait(self) -> None:
        """Until all work before it has finished."""
        ...

    def seconds_since(self, earlier: DeviceMark) -> float | None:
        """Device time between two marks that are done; None where the device keeps no time."""
        ...


class Device(Protocol):
    """One stream of work, in which everything runs in the order in which it was enqueued."""

    torch_device: torch.device
    asynchronous: bool
    """Whether work goes on after the call that asked for it has returned."""

    def record(self) -> DeviceMark:
        """Mark the end of what has been enqueued so far."""
        ...


class _Finished:
    """On a device that has finished whenever a call returns."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: DeviceMark) -> float | None:
        return None


class HostDevice:
    """The CPU."""

    asynchronous = False

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self._finished = _Finished()

    def record(self) -> DeviceMark:
        """See `Device`."""
        return self._finished


class _CudaMark:
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
    """The current stream of a CUDA device."""

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device

    def record(self) -> DeviceMark:
        """See `Device`."""
        return _CudaMark(torch.cuda.current_stream(self.torch_device))


def device_of(device: torch.device) -> Device:
    """The one that keeps track of this torch device's work."""
    return CudaDevice(device) if device.type == "cuda" else HostDevice()


class RunAhead:
    """Bounds how many layers the host has enqueued that the device has not finished.

    Without a bound, a host that enqueues a long prefill's layers in a millisecond each would have
    asked for all of them before the first is done, and nothing would be left to preempt. With a
    depth of 1 the device would idle while the host enqueues; with 2 one layer runs meanwhile.

    Args:
        depth: most unfinished layers once the next one is enqueued, at least 1.
    """

    def __init__(self, device: Device, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"the host must be allowed at least 1 layer ahead, not {depth}")
        self._device = device
        self._depth = depth
        self._marks: deque[DeviceMark] = deque()
        self._held = 0

    def before_layer(self, ask: Callable[[], None]) -> None:
        """Call before each layer is enqueued; ``ask`` may run other passes first.

        It is asked, and returns, when fewer than ``depth`` of the layers enqueued so far are
        unfinished.
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
        """The mark made here stands for the layer before it, and express work behind that."""
        self._held += 1
        self._marks.append(self._device.record())
        while len(self._marks) >= self._depth:
            self._marks.popleft().wait()
