"""Samples of a server's state for everybody who watches, taken once for all of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

log = logging.getLogger(__name__)

PERIOD_SECONDS = 0.5
MOST_WATCHERS = 16


class TooManyWatchersError(Exception):
    """The feed has as many watchers as it may have."""


class PageFeed:
    """Takes a sample every period while somebody watches, and none otherwise.

    A sample is made and encoded once, however many watch. There are no queues: a watcher that reads
    slowly misses samples and gets the newest one.

    Args:
        look: returns the state, JSON-ready. It must take well under 20 ms.
        on_watched: told True before the first sample and False after the last watcher has gone.
        sleep: waits for some seconds; tests give another one.
    """

    def __init__(
        self,
        look: Callable[[], dict[str, Any]],
        on_watched: Callable[[bool], None],
        *,
        period_seconds: float = PERIOD_SECONDS,
        most_watchers: int = MOST_WATCHERS,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self._look = look
        self._on_watched = on_watched
        self._period_seconds = period_seconds
        self._most_watchers = most_watchers
        self._sleep = sleep
        self._watchers = 0
        self._sampler: asyncio.Task[None] | None = None
        self._next: asyncio.Future[bytes] | None = None
        self._last: bytes | None = None
        """The newest sample while somebody watches."""

    @property
    def watchers(self) -> int:
        """How many watch now."""
        return self._watchers

    def join(self) -> None:
        """Take a place among the watchers; `leave` gives it back.

        Raises:
            TooManyWatchersError: all places are taken.
        """
        if self._watchers >= self._most_watchers:
            raise TooManyWatchersError
        self._watchers += 1
        if self._sampler is None:
            self._on_watched(True)
            self._next = asyncio.get_running_loop().create_future()
            self._sampler = asyncio.create_task(self._take_samples())

    def leave(self) -> None:
        """Give the place of one watcher back. The last one to leave ends the sampling."""
        self._watchers -= 1
        if self._watchers == 0 and self._sampler is not None:
            self._sampler.cancel()
            self._sampler = self._last = None
            self._on_watched(False)

    async def samples(self) -> AsyncGenerator[bytes, None]:
        """Yield samples as JSON, the newest one at once, for a watcher that has joined."""
        if self._last is None:
            self._last = self._encode()
        yield self._last
        while True:
            assert self._next is not None
            yield await asyncio.shield(self._next)

    async def _take_samples(self) -> None:
        while True:
            await self._sleep(self._period_seconds)
            taken, self._next = self._next, asyncio.get_running_loop().create_future()
            assert taken is not None
            self._last = self._encode()
            taken.set_result(self._last)

    def _encode(self) -> bytes:
        try:
            return msgspec.json.encode(self._look())
        except Exception as error:
            # One sample that cannot be made must not end the feed of all.
            log.exception("the state cannot be sampled")
            return msgspec.json.encode({"error": type(error).__name__})
