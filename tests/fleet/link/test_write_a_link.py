"""docs/write-a-link.md: its dialect, as it stands on the page, serves requests."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pla_serve.fleet.link.http import HttpLink, HttpLinkTimes
from pla_serve.fleet.link.mapping import Unmappable
from pla_serve.wire.engine import AddRequest, Grammar, SamplingParams
from tests.fleet.link.fake_http import FakeServer, Json, serving
from tests.fleet.link.link_harness import FAST, Recorder, running

PAGE = Path(__file__).parents[3] / "docs" / "write-a-link.md"


@pytest.fixture(scope="module")
def dialect() -> Any:
    """The first code block of the page, as a module."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert code is not None
    module = ModuleType("llamacpp_of_the_page")
    exec(compile(code[1], str(PAGE), "exec"), module.__dict__)
    return module.LlamaCppDialect()


def events(body: Json) -> Iterator[Json]:
    """llama-server's stream: a token each, and an end without one."""
    tokens = body["prompt"][: body["n_predict"]]
    for token in tokens:
        yield {"content": "x", "tokens": [token], "stop": False}
    limited = len(tokens) == body["n_predict"]
    yield {"content": "", "tokens": [], "stop": True, "stop_type": "limit" if limited else "eos"}


def ask(dialect: Any, max_tokens: int) -> Recorder:
    recorder = Recorder()

    async def main() -> None:
        async with serving(FakeServer(events)) as server:
            link = HttpLink(
                server.url, recorder, dialect, times=HttpLinkTimes(poll=0.02, backoff=FAST)
            )
            async with running(link):
                await recorder.until(lambda: recorder.boots and recorder.reports)
                sampling = SamplingParams(max_tokens=max_tokens)
                link.send(AddRequest(id="a", prompt=[5, 6, 7], sampling=sampling, arrival=0.0))
                await recorder.until(lambda: recorder.finish("a"))

    asyncio.run(main())
    return recorder


@pytest.mark.parametrize(("most", "tokens", "end"), [(2, [5, 6], "length"), (8, [5, 6, 7], "stop")])
def test_tokens_and_their_end(dialect: Any, most: int, tokens: list[int], end: str) -> None:
    recorder = ask(dialect, most)
    assert [token for output in recorder.outputs("a") for token in output.tokens] == tokens
    assert recorder.finish("a") == end


def test_what_it_cannot_do_is_refused_by_name(dialect: Any) -> None:
    sampling = SamplingParams(max_tokens=1, grammar=Grammar("json_object"))
    with pytest.raises(Unmappable, match="grammars"):
        dialect.body(AddRequest(id="a", prompt=[1], sampling=sampling, arrival=0.0), "m")
