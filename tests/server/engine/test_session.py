"""The session of one HTTP request: news is merged, bounded, and ends when it must."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from pla_serve.server.engine.session import EngineDiedError, EngineSession, SlowReaderError
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    Inbound,
    Output,
    Rejected,
    SamplingParams,
    TokenLogprob,
)


class Router:
    """Records what a session asks for."""

    def __init__(self) -> None:
        self.routes: dict[str, EngineSession] = {}
        self.sent: list[Inbound] = []

    def open_route(self, id: str, session: EngineSession) -> None:
        self.routes[id] = session

    def close_route(self, id: str) -> None:
        self.routes.pop(id, None)

    def send(self, message: Inbound) -> None:
        self.sent.append(message)

    @property
    def aborted(self) -> list[str]:
        return [message.id for message in self.sent if isinstance(message, AbortRequest)]


def add(id: str) -> AddRequest:
    return AddRequest(id=id, prompt=[1], sampling=SamplingParams(max_tokens=9), arrival=0.0)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def test_news_is_merged_while_nobody_looks() -> None:
    async def main() -> None:
        session = EngineSession(Router(), max_unread_tokens=10)
        session.submit(add("a"))
        session.take(Accepted("a", 4))
        session.take(Output(id="a", tokens=[1], logprobs=[TokenLogprob(-1.0, 1, [])]))
        session.take(
            Output(
                id="a",
                tokens=[2],
                logprobs=[TokenLogprob(-2.0, 1, [])],
                cached_tokens=5,
                finish_reason="stop",
                stop_token=2,
            )
        )
        (update,) = await session.receive()
        assert update.tokens == [1, 2]
        assert [entry.logprob for entry in update.logprobs] == [-1.0, -2.0]
        assert (update.cached_tokens, update.finish_reason, update.stop_token) == (5, "stop", 2)
        assert await session.receive(timeout=0.001) == []

    run(main())


def test_later_news_does_not_undo_what_came_first() -> None:
    async def main() -> None:
        session = EngineSession(Router(), max_unread_tokens=10)
        session.submit(add("a"))
        session.take(Output(id="a", tokens=[1], cached_tokens=5))
        session.take(Output(id="a", tokens=[2]))
        (update,) = await session.receive()
        assert update.cached_tokens == 5
        assert update.finish_reason is None

    run(main())


def test_finished_and_rejected_sequences_leave_no_route() -> None:
    async def main() -> None:
        router = Router()
        session = EngineSession(router, max_unread_tokens=10)
        for id in "abc":
            session.submit(add(id))
        session.take(Output(id="a", tokens=[1], finish_reason="length"))
        session.take(Rejected(id="b", reason="full", retry_after=1.0))
        assert set(router.routes) == {"c"}
        session.close()
        assert not router.routes
        assert router.aborted == ["c"]
        session.close()
        assert router.aborted == ["c"]

    run(main())


def test_aborted_sequence_has_no_more_news() -> None:
    async def main() -> None:
        router = Router()
        session = EngineSession(router, max_unread_tokens=10)
        session.submit(add("a"))
        session.submit(add("b"))
        session.take(Output(id="a", tokens=[1]))
        session.take(Output(id="b", tokens=[1]))
        session.abort("a")
        session.abort("unknown")
        assert [update.id for update in await session.receive()] == ["b"]
        assert router.aborted == ["a"]

    run(main())


def test_unread_tokens_are_bounded() -> None:
    async def main() -> None:
        router = Router()
        session = EngineSession(router, max_unread_tokens=3)
        session.submit(add("a"))
        session.submit(add("b"))
        for _ in range(3):
            session.take(Output(id="a", tokens=[1]))
        assert router.aborted == []
        session.take(Output(id="a", tokens=[1]))
        assert sorted(router.aborted) == ["a", "b"]
        with pytest.raises(SlowReaderError):
            await session.receive()

    run(main())


def test_reading_resets_the_bound() -> None:
    async def main() -> None:
        session = EngineSession(Router(), max_unread_tokens=3)
        session.submit(add("a"))
        for _ in range(10):
            session.take(Output(id="a", tokens=[1, 2, 3]))
            assert len((await session.receive())[0].tokens) == 3

    run(main())


def test_death_comes_after_what_was_said() -> None:
    async def main() -> None:
        router = Router()
        session = EngineSession(router, max_unread_tokens=3)
        session.submit(add("a"))
        session.take(Output(id="a", tokens=[1]))
        session.fail(EngineDiedError("gone"))
        assert (await session.receive())[0].tokens == [1]
        with pytest.raises(EngineDiedError, match="gone"):
            await session.receive()
        assert not router.routes
        assert router.aborted == []  # there is nobody to tell

    run(main())


def test_death_wakes_who_waits() -> None:
    async def main() -> None:
        session = EngineSession(Router(), max_unread_tokens=3)
        session.submit(add("a"))
        waiting = asyncio.create_task(session.receive())
        await asyncio.sleep(0)
        session.fail(EngineDiedError("gone"))
        with pytest.raises(EngineDiedError):
            await waiting

    run(main())


def test_one_timer_serves_waits_of_any_length() -> None:
    async def main() -> None:
        session = EngineSession(Router(), max_unread_tokens=10)
        session.submit(add("a"))
        loop = asyncio.get_running_loop()
        loop.call_soon(session.take, Output(id="a", tokens=[1]))
        assert await session.receive(timeout=60)
        async with asyncio.timeout(5):
            assert await session.receive(timeout=0.001) == [], "and not after a minute"
        loop.call_soon(session.take, Output(id="a", tokens=[2]))
        assert await session.receive(timeout=0.01)
        endless = asyncio.create_task(session.receive())
        await asyncio.sleep(0.05)
        assert not endless.done(), "the timer of an earlier wait is no news"
        session.take(Output(id="a", tokens=[3]))
        assert [update.tokens for update in await endless] == [[3]]
        session.close()

    run(main())
