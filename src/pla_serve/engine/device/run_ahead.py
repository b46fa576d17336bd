"""Bounds how far the host enqueues layers ahead of the device, and times its next decision."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from pla_serve.engine.device.marks import Device, DeviceMark

NAP_SECONDS = 5e-5
"""Time between two looks at a device while the host waits for the moment to decide."""
MARGIN = 2.0
"""Multiple of the time to enqueue a layer that the host keeps before the device runs dry."""
FORGET = 0.2
"""Share of the newest time in the running mean of the time to enqueue a layer."""


class RunAhead:
    """Bounds the number of layers that the host has enqueued and the device has not finished.

    Without a bound, a host that enqueues the layers of a long prefill in a millisecond each would
    have enqueued all of them before the first is done, and nothing would be left to preempt. With a
    depth of 1 the device would idle while the host enqueues. With 2 it runs one layer meanwhile.

    Whether the next layer or an express batch goes first is decided as late as possible: not when
    the layer before it begins, but shortly before that one ends, by as much time as the host needs
    to enqueue a layer. So what arrives while a layer runs goes first after that layer. The length
    of a layer is that of the one before it, by the device's own marks.

    Args:
        depth: most unfinished layers once the next one is enqueued, at least 1.
        clock: monotonic seconds of the host.
        sleep: waits so many seconds.

    Raises:
        ValueError: ``depth`` is less than 1.
    """

    def __init__(
        self,
        device: Device,
        depth: int = 2,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if depth < 1:
            raise ValueError(f"the host must be allowed at least 1 layer ahead, not {depth}")
        self._device = device
        self._depth = depth
        self._clock = clock
        self._sleep = sleep
        self._marks: deque[DeviceMark] = deque()
        self._last_done: DeviceMark | None = None
        """The newest mark that the host knows to be done."""
        self._held = 0
        self._enqueue_seconds: float | None = None
        """Running mean of the host's time to enqueue a layer, once it is known."""
        self._released: float | None = None
        """When the host went on to enqueue a layer, if nothing else has been enqueued since."""

    def before_layer(self, ask: Callable[[], None]) -> None:
        """Wait until the next layer may be enqueued, and call ``ask``, which may run other passes.

        ``ask`` is called when fewer than ``depth`` of the enqueued layers are unfinished, and the
        same holds when this returns.
        """
        if not self._device.asynchronous:
            ask()
            return
        self._measure_enqueueing()
        length = self._hold()
        if length is not None and self._enqueue_seconds is not None:
            lead = MARGIN * (self._enqueue_seconds + NAP_SECONDS)
            self._wait_for_the_end(self._clock() + length - lead)
        held = self._held
        ask()
        if self._held != held:  # layers of other passes have been enqueued meanwhile
            self._hold()
        self._released = self._clock()

    def _measure_enqueueing(self) -> None:
        if self._released is not None:
            took = self._clock() - self._released
            mean = took if self._enqueue_seconds is None else self._enqueue_seconds
            self._enqueue_seconds = mean + FORGET * (took - mean)
            self._released = None

    def _hold(self) -> float | None:
        """Mark the end of the last layer and of passes after it, and wait for an earlier mark.

        Returns:
            Seconds that the layer which has just begun will probably take: those of the layer that
            has just ended. None if the host came too late to see one end and the next begin.
        """
        self._held += 1
        self._marks.append(self._device.record())
        length = None
        while len(self._marks) >= self._depth:
            mark = self._marks.popleft()
            seen = not mark.done()
            mark.wait()
            if self._last_done is not None and seen:
                length = mark.seconds_since(self._last_done)
            self._last_done = mark
        return length

    def _wait_for_the_end(self, until: float) -> None:
        """Wait until this time, or until the device has nothing left to do."""
        newest = self._marks[-1] if self._marks else None
        while newest is not None and not newest.done():
            left = until - self._clock()
            if left <= 0:
                return
            self._sleep(min(left, NAP_SECONDS))
