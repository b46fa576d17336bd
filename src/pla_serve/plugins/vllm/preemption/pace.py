"""Bounds the run-ahead of the host on a device that computes what it was given later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol


class DeviceEvent(Protocol):
    """A mark in a stream of device work."""

    def record(self) -> None:
        """Set the mark behind all work that has been enqueued."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has reached the mark."""
        ...


class HostPace:
    """Lets the host enqueue at most ``layers`` layers that the device has not finished.

    A host that runs ahead of its device reaches the last layer boundary long before the device has
    reached the first one, and whatever comes then would wait for all of it.

    Args:
        make_event: makes an event of the device; None where computing returns when it is done.
        layers: the bound, at least 1.
    """

    def __init__(self, make_event: Callable[[], DeviceEvent] | None, layers: int = 2) -> None:
        self._make_event = make_event
        self._layers = layers
        self._marks: deque[DeviceEvent] = deque()

    def pace(self) -> None:
        """Mark this layer boundary, and wait for the one that is ``layers`` before it."""
        if self._make_event is None:
            return
        event = self._make_event()
        event.record()
        self._marks.append(event)
        if len(self._marks) > self._layers:
            self._marks.popleft().synchronize()

    def end(self) -> None:
        """Forget the marks of a step that is over."""
        self._marks.clear()
