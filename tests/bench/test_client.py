from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.bench.client import TimedRequest, exchange, per_token

EVENTS = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=20)


@given(EVENTS, st.none() | st.integers(0, 500))
def test_gaps_are_one_for_each_token_and_take_the_time_that_passed(
    events: list[tuple[float, int]], tokens: int | None
) -> None:
    gaps = [gap for gap, _ in events[1:]]
    sizes = [size for _, size in events]
    found = per_token(gaps, sizes, tokens)
    assert sum(found) == pytest.approx(sum(gaps))
    if tokens is None or tokens <= len(events) or not gaps:
        assert found == gaps
    else:
        assert len(gaps) <= len(found) <= tokens - 1


def test_longer_texts_have_more_of_the_tokens() -> None:
    assert per_token([0.1, 0.3], [4, 4, 40], 5) == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert per_token([0.2, 0.2], [4, 4, 4], 3) == [0.2, 0.2]
    assert per_token([0.6], [1, 5], 4) == pytest.approx([0.2] * 3)


class TwoTokensAnEvent:
    """A server whose events carry two tokens each, a second apart."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        yield 200, self._portions()

    async def _portions(self) -> AsyncIterator[bytes]:
        for _ in range(3):
            self.now += 1.0
            yield b'data: {"choices": [{"text": "ab"}]}\n\n'
        yield b'data: {"choices": [], "usage": {"completion_tokens": 6}}\n\n'
        yield b"data: [DONE]\n\n"


def test_an_event_of_several_tokens_is_as_many_gaps() -> None:
    server, request = TwoTokensAnEvent(), TimedRequest()
    asyncio.run(exchange(server, "/v1/completions", b"{}", server.clock, request))
    assert request.error is None
    assert request.gaps == pytest.approx([0.5] * 4)
    assert request.pause == pytest.approx(1.0), "the stream stood still for a whole second"
