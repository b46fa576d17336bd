"""Measures how long the event loop is held: how late a timer fires."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL_SECONDS = 0.05
"""Time between two measurements: 20 a second cost some 0.1% of a core."""


class LoopLag:
    """Reports to ``observe``, in seconds, how late each of its timers fired.

    A callback that holds the loop for a time is seen with at most `INTERVAL_SECONDS` less.

    Args:
        clock: seconds; the running loop's own by default.
    """

    def __init__(
        self,
        observe: Callable[[float], None],
        *,
        interval: float = INTERVAL_SECONDS,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.worst = 0.0
        """Largest lag since the start, or since it was set to zero."""
        self._observe = observe
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def start(self) -> None:
        self._due = self._clock() + self._interval
        self._timer = self._loop.call_later(self._interval, self.fired)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def fired(self) -> None:
        """The timer has fired: measure, and set the next one."""
        lag = max(0.0, self._clock() - self._due)
        self.worst = max(self.worst, lag)
        self._observe(lag)
        self.start()
