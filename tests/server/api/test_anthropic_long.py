"""Long answers of ``/v1/messages``: others are served while one is read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pla_serve.server.api.answer import LONG
from pla_serve.server.api.anthropic.answer import MessageAnswer
from pla_serve.server.api.choice_reading import Reading
from pla_serve.server.generation.generation import ChoiceDelta, Generation
from pla_serve.server.reasoning.reader import TextReader
from pla_serve.server.tools.events import AnswerEvent


@pytest.mark.parametrize("tokens", [1, LONG])
def test_a_long_answer_is_read_in_a_thread(tokens: int) -> None:
    class Reader(TextReader):
        thread: int

        def push(self, text: str) -> list[AnswerEvent]:
            Reader.thread = threading.get_ident()
            return super().push(text)

    class Echo:
        plan = SimpleNamespace(tier=None)

        async def deltas(self) -> AsyncIterator[list[ChoiceDelta]]:
            yield [ChoiceDelta(0, "x" * tokens, [7] * tokens, [], "stop", None)]

        def usage(self) -> Any:
            details = {"cached_tokens": 0}
            return {
                "prompt_tokens": 1,
                "completion_tokens": tokens,
                "prompt_tokens_details": details,
            }

    answer = MessageAnswer(cast(Generation, Echo()), Reading(Reader), id="m", model="m")
    content = asyncio.run(answer.whole())["content"]
    assert content[0]["text"] == "x" * tokens
    assert (Reader.thread == threading.get_ident()) is (tokens == 1)
