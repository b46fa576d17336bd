"""Answers in the background by themselves: their number, and cancels at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from pla_serve.server.api.guard import Traffic
from pla_serve.server.api.responses.answer import ResponseFrame
from pla_serve.server.api.responses.background import BackgroundRuns
from pla_serve.server.errors import ApiError
from pla_serve.server.records.metrics import Metrics


class Frame:
    """As much of a frame as is needed."""

    def __init__(self, id: str) -> None:
        self.id = id


class Work:
    """An answer that is made, and stored, when the test says so."""

    def __init__(self) -> None:
        self.made, self.stored = asyncio.Event(), asyncio.Event()
        self.is_storing = asyncio.Event()
        self.kept: list[Any] = []

    async def make(self) -> Any:
        try:
            await self.made.wait()
        except asyncio.CancelledError:
            return "cancelled"
        return "completed"

    async def keep(self, answer: Any) -> None:
        self.is_storing.set()
        await self.stored.wait()
        self.kept.append(answer)


def start(runs: BackgroundRuns, id: str, tenant: str = "a") -> Work:
    work = Work()
    frame = cast(ResponseFrame, Frame(id))
    runs.start(tenant, frame, work.make, work.keep)
    return work


def in_a_loop(test: Callable[[BackgroundRuns], Awaitable[None]], most: int = 8) -> None:
    async def main() -> None:
        await test(BackgroundRuns(Traffic(Metrics("m")), most))

    asyncio.run(main())


def test_requests_that_were_checked_together_do_not_all_begin() -> None:
    """Between the check and the beginning, each waits for the engine."""

    async def test(runs: BackgroundRuns) -> None:
        for _ in range(3):
            runs.check_room("a")
        first = start(runs, "1")
        with pytest.raises(ApiError) as refused:
            start(runs, "2")
        assert refused.value.status == 429
        other = start(runs, "3", "b")
        await asyncio.sleep(0)
        first.stored.set()
        await runs.cancel("a", "1")
        last = start(runs, "4")
        await asyncio.sleep(0)
        other.stored.set()
        last.stored.set()
        await runs.cancel("a", "4")
        await runs.cancel("b", "3")

    in_a_loop(test, most=2)


@pytest.mark.parametrize("cancels", [1, 3])
def test_an_answer_is_kept_however_often_it_is_cancelled(cancels: int) -> None:
    async def test(runs: BackgroundRuns) -> None:
        work = start(runs, "1")
        await asyncio.sleep(0)
        ends = [asyncio.create_task(runs.cancel("a", "1")) for _ in range(cancels)]
        await work.is_storing.wait()
        ends.append(asyncio.create_task(runs.cancel("a", "1")))
        await asyncio.sleep(0)
        work.stored.set()
        await asyncio.gather(*ends)
        assert work.kept == ["cancelled"]
        assert runs.get("a", "1") is None

    in_a_loop(test)


def test_an_answer_that_is_being_stored_is_not_cancelled() -> None:
    async def test(runs: BackgroundRuns) -> None:
        work = start(runs, "1")
        work.made.set()
        await work.is_storing.wait()
        end = asyncio.create_task(runs.cancel("a", "1"))
        await asyncio.sleep(0)
        work.stored.set()
        await end
        assert work.kept == ["completed"]

    in_a_loop(test)
