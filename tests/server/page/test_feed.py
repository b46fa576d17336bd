"""The feed: one sampler for all watchers, and none without."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest

from pla_serve.server.page.feed import PageFeed, TooManyWatchersError


class Periods:
    """Stands for `asyncio.sleep`: a period ends when the test says so."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self._over: asyncio.Future[None] | None = None

    async def sleep(self, seconds: float) -> None:
        self._over = asyncio.get_running_loop().create_future()
        self.waiting.set()
        await self._over

    async def end(self) -> None:
        await self.waiting.wait()
        self.waiting.clear()
        assert self._over is not None
        self._over.set_result(None)
        await self.waiting.wait()


class Looks:
    """Counts samples."""

    def __init__(self) -> None:
        self.count = 0
        self.fails = False
        self.watched: list[bool] = []

    def look(self) -> dict[str, Any]:
        self.count += 1
        if self.fails:
            raise ValueError("a secret")
        return {"number": self.count}


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def make(most: int = 16) -> tuple[PageFeed, Looks, Periods]:
    looks, periods = Looks(), Periods()
    feed = PageFeed(looks.look, looks.watched.append, most_watchers=most, sleep=periods.sleep)
    return feed, looks, periods


def number(sample: bytes) -> int:
    value: int = json.loads(sample)["number"]
    return value


def test_one_sample_serves_all_watchers() -> None:
    async def test() -> None:
        feed, looks, periods = make()
        watchers = []
        for _ in range(5):
            feed.join()
            watchers.append(feed.samples())
        assert [number(await anext(each)) for each in watchers] == [1] * 5
        following = [asyncio.ensure_future(anext(each)) for each in watchers]
        await periods.end()
        assert [number(await each) for each in following] == [2] * 5
        assert looks.count == 2
        for _ in watchers:
            feed.leave()

    run(test())


def test_nobody_who_watches_means_no_samples() -> None:
    async def test() -> None:
        before = asyncio.all_tasks()
        feed, looks, periods = make()
        assert looks.watched == []
        feed.join()
        await anext(feed.samples())
        await periods.end()
        feed.leave()
        assert looks.watched == [True, False]
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before
        taken = looks.count
        feed.join()
        assert number(await anext(feed.samples())) == taken + 1  # and not an old one
        feed.leave()
        assert looks.watched == [True, False, True, False]

    run(test())


def test_slow_watcher_gets_the_newest_sample_and_keeps_none() -> None:
    async def test() -> None:
        feed, _, periods = make()
        feed.join()
        samples = feed.samples()
        assert number(await anext(samples)) == 1
        for _ in range(10):
            await periods.end()
        following = asyncio.ensure_future(anext(samples))
        await asyncio.sleep(0)
        await periods.end()
        assert number(await following) == 12
        feed.leave()

    run(test())


def test_places_are_bounded_and_given_back() -> None:
    async def test() -> None:
        feed, _, _ = make(most=2)
        feed.join()
        feed.join()
        with pytest.raises(TooManyWatchersError):
            feed.join()
        assert feed.watchers == 2
        feed.leave()
        feed.join()
        feed.leave()
        feed.leave()
        assert feed.watchers == 0

    run(test())


def test_sample_that_fails_ends_nothing_and_tells_little() -> None:
    async def test() -> None:
        feed, looks, periods = make()
        looks.fails = True
        feed.join()
        samples = feed.samples()
        assert json.loads(await anext(samples)) == {"error": "ValueError"}
        looks.fails = False
        following = asyncio.ensure_future(anext(samples))
        await periods.end()
        assert number(await following) == 2
        feed.leave()

    run(test())


def test_watcher_that_is_cancelled_takes_no_one_along() -> None:
    async def test() -> None:
        feed, _, periods = make()
        feed.join()
        feed.join()
        stays, goes = feed.samples(), feed.samples()
        await anext(stays)
        await anext(goes)
        waits = [asyncio.ensure_future(anext(each)) for each in (stays, goes)]
        await asyncio.sleep(0)
        waits[1].cancel()
        feed.leave()
        await periods.end()
        assert number(await waits[0]) == 2
        feed.leave()

    run(test())
