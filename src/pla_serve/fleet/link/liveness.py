"""When to try again, and when silence means that a peer is lost."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass

log = logging.getLogger(__name__)


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
        """After so many failures in a row, at least 1."""
        return float(min(self.base * 2.0 ** min(failures - 1, 30), self.most))


class Retries:
    """Failures in a row of the connection to one instance, and the pauses after them.

    Args:
        closing: ends a pause when it is set.
    """

    def __init__(self, url: str, backoff: Backoff, closing: asyncio.Event) -> None:
        self._url = url
        self._backoff = backoff
        self._closing = closing
        self._failures = 0

    def connected(self) -> None:
        """The row has ended."""
        self._failures = 0

    async def pause(self, reason: str) -> None:
        """Wait after a failure. Only the first of a row is worth a warning."""
        self._failures += 1
        delay = self._backoff.delay(self._failures)
        level = logging.WARNING if self._failures == 1 else logging.DEBUG
        log.log(level, "%s: %s; trying again in %.1f s", self._url, reason, delay)
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._closing.wait()


class PeerSilence:
    """How long a peer has said nothing, without the time in which this process did not run.

    `tick` is asked in steps of ``interval``. A step that took longer counts as two of them: this
    process was stopped or busy, and what the peer said meanwhile may be waiting to be read.

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
        """The peer has said something."""
        self._silent = 0.0

    def tick(self, now: float) -> bool:
        """True once the peer is lost."""
        self._silent += min(now - self._last, 2 * self.interval)
        self._last = now
        return self._silent > self.seconds
