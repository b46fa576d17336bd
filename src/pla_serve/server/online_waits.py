"""Counts the requests of clients that wait for their first token."""

from __future__ import annotations

from collections.abc import Callable


class OnlineWaits:
    """Tells offline work when nobody waits for a first token. Belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting = 0
        self.on_clear: Callable[[], None] = lambda: None
        """Called each time that the last request stops waiting."""

    @property
    def waiting(self) -> int:
        """Requests that were planned and have no token yet."""
        return self._waiting

    def begin(self) -> Callable[[], None]:
        """Count one more request.

        Returns:
            What ends its wait; calls after the first change nothing.
        """
        self._waiting += 1
        ended = False

        def end() -> None:
            nonlocal ended
            if ended:
                return
            ended = True
            self._waiting -= 1
            if not self._waiting:
                self.on_clear()

        return end
