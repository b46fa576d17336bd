"""Decides when a process that ended is started again, and whether a process hangs."""

from __future__ import annotations

from pla_serve.fleet.supervisor.spec import Health


class Restarts:
    """Starts and ends of one process. Times are seconds on the caller's clock."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._began = 0.0
        self._row = 0
        self.count = 0
        """Number of restarts."""

    def started(self, now: float) -> None:
        """Note that the process was started."""
        self._began = now

    def ended(self, now: float) -> float:
        """Note that the process ended, and return the earliest time to start it again."""
        health = self._health
        self._row = 1 if now - self._began >= health.steady_seconds else self._row + 1
        self.count += 1
        if self._row < 2:
            return now
        # The exponent is bounded: 2.0**1024 is no float.
        wait = health.base_seconds * 2.0 ** min(self._row - 2, 60)
        return now + float(min(wait, health.most_seconds))


class HangDetector:
    """Decides whether a process that should answer hangs."""

    def __init__(self, health: Health, now: float) -> None:
        self._health = health
        self._heard = now
        self._answered = False

    def answered(self, now: float) -> None:
        """Note an answer."""
        self._heard = now
        self._answered = True

    def hangs(self, now: float) -> bool:
        """Whether the last answer is too long ago."""
        health = self._health
        patience = health.hang_seconds if self._answered else health.start_seconds
        return now - self._heard >= patience
