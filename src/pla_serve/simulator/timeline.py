"""Virtual time: a clock that moves from one event to the next."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any

Call = Callable[[Any], None]


class Timeline:
    """Events in order of time; those of one moment in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds of virtual time."""
        self._heap: list[tuple[float, int, Call, Any]] = []
        self._serial = count()
        self._running = False

    def clock(self) -> float:
        """The current time, for whoever wants a function."""
        return self.now

    def at(self, time: float, call: Call, argument: Any = None) -> None:
        """Call a function with ``argument`` at ``time``; never, if that is infinite."""
        if time < inf:
            heappush(self._heap, (time, next(self._serial), call, argument))

    def later(self, seconds: float, call: Callable[[], None]) -> VirtualTimer:
        """Call a function after so long, unless the timer that is returned is cancelled before."""
        timer = VirtualTimer(call)
        self.at(self.now + seconds, _ring, timer)
        return timer

    def first(self, time: float, call: Call, argument: Any) -> None:
        """Call a function at ``time``, before everything else at that time.

        At most one such call may be pending.
        """
        heappush(self._heap, (time, -1, call, argument))

    def run(self) -> None:
        """Handle events until `stop` is called or there are none."""
        self._running, heap = True, self._heap
        while self._running and heap:
            self.now, _, call, argument = heappop(heap)
            call(argument)

    def stop(self) -> None:
        """End `run` after the event that is being handled."""
        self._running = False


class VirtualTimer:
    """A call that is due at a moment of virtual time."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Prevent the call; a call that was made is not affected."""
        self._call = None

    def ring(self) -> None:
        """Make the call, if it was not cancelled."""
        call, self._call = self._call, None
        if call is not None:
            call()


def _ring(timer: VirtualTimer) -> None:
    timer.ring()
