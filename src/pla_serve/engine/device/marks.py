"""Marks in a device's stream of work, by which the host follows its progress."""

from __future__ import annotations

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
