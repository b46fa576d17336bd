"""Pauses between attempts to connect, and detection of peers that have gone silent."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass

log = logging.getLogger(__name__)

MOST_INTERVALS = 1.25
"""Time between two looks at a peer that counts as its silence, in intervals; more is our own."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds between attempts to connect: doubled from ``base`` to ``most``.

    Raises:
        ValueError: not 0 < base <= most.
    """

    base: float = 0.1
    most: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.base <= self.most:
            raise ValueError(f"a backoff needs 0 < base <= most, not {self.base} and {self.most}")

    def delay(self, failures: int) -> float:
        """Return the seconds to wait after so many failures in a row, which are at least 1."""
        return float(min(self.base * 2.0 ** min(failures - 1, 30), self.most))


class Retries:
    """Counts the consecutive failures to connect to one instance, and pauses after each.

    Args:
        closing: ends a pause when it is set.
    """

    def __init__(self, url: str, backoff: Backoff, closing: asyncio.Event) -> None:
        self._url = url
        self._backoff = backoff
        self._closing = closing
        self._failures = 0

    def connected(self) -> None:
        """Note that the connection works, so that the next failure counts as the first."""
        self._failures = 0

    async def pause(self, reason: str) -> None:
        """Wait after a failure. Only the first of consecutive failures is logged as a warning."""
        self._failures += 1
        delay = self._backoff.delay(self._failures)
        level = logging.WARNING if self._failures == 1 else logging.DEBUG
        log.log(level, "%s: %s; trying again in %.1f s", self._url, reason, delay)
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._closing.wait()


class PeerSilence:
    """Measures for how many seconds a peer has sent nothing.

    Time in which this process did not run does not count. `tick` should be called every
    ``interval`` seconds. If it comes later, this process was stopped, busy, or starved by others on
    the machine, and messages of the peer may wait to be read; so little more than an interval is
    counted.

    Args:
        seconds: of silence that mean that the peer is lost.

    Raises:
        ValueError: ``seconds`` is not positive.
    """

    def __init__(self, seconds: float, now: float) -> None:
        if not seconds > 0:
            raise ValueError(f"the seconds of silence must be positive, not {seconds}")
        self.seconds = seconds
        self.interval = seconds / 8
        self._silent = 0.0
        self._last = now

    def heard(self) -> None:
        """Note that the peer has sent something."""
        self._silent = 0.0

    def tick(self, now: float) -> bool:
        """Count the time until ``now``, and return whether the peer counts as lost."""
        self._silent += min(now - self._last, MOST_INTERVALS * self.interval)
        self._last = now
        return self._silent > self.seconds
