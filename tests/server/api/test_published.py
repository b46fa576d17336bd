"""Answers of the older endpoints against OpenAI's published OpenAPI description.

Those of responses are checked in their own tests. In chunks ``finish_reason``, ``logprobs`` and
``usage`` are null until there is something to say, as in the description's own examples, although
its schemas do not allow it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.api.test_tool_calls import ECHO_LAST, OFFERED, TWO
from tests.server.published import check
from tests.server.server_harness import Live

ASKED = [{"role": "user", "content": f"<think>\nhm\n</think>\n\n{TWO}"}]
LOGPROBS = {"logprobs": True, "top_logprobs": 2}
USAGE = {"stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    live = Live(
        tool_parser="hermes", reasoning_parser="qwen3", chat_template=ECHO_LAST, context=2048
    )
    live.wait_ready()
    yield live
    live.close()


def ask(live: Live, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return an answer, or all chunks of it."""
    found = httpx.post(f"{live.url}/v1/{path}", json=body, timeout=20)
    assert found.status_code == 200, found.text
    if not body.get("stream"):
        return [found.json()]
    blocks = [block.removeprefix("data: ") for block in found.text.split("\n\n")[:-1]]
    assert blocks.pop() == "[DONE]"
    return [json.loads(block) for block in blocks]


def without_nulls(chunk: dict[str, Any]) -> dict[str, Any]:
    """Return a chunk as the schemas have it; they know only the last one of a choice."""
    chunk = {name: value for name, value in chunk.items() if value is not None}
    for choice in chunk["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        if "delta" in choice and choice["logprobs"] is None:
            del choice["logprobs"]
        elif "delta" in choice:
            choice["logprobs"]["refusal"] = choice["logprobs"]["refusal"] or []
    return chunk


@pytest.mark.parametrize("fields", [{}, LOGPROBS, {"max_tokens": 3}, {"n": 2}])
def test_chat(live: Live, fields: dict[str, Any]) -> None:
    asked = {"messages": ASKED, "tools": OFFERED, **fields}
    (answer,) = ask(live, "chat/completions", **asked)
    check("openai", "CreateChatCompletionResponse", answer)
    for chunk in ask(live, "chat/completions", stream=True, **USAGE, **asked):
        check("openai", "CreateChatCompletionStreamResponse", without_nulls(chunk))


@pytest.mark.parametrize("fields", [{}, {"logprobs": 2}, {"max_tokens": 2}, {"echo": True}])
@pytest.mark.parametrize("stream", [False, True])
def test_completions(live: Live, fields: dict[str, Any], stream: bool) -> None:
    for answer in ask(live, "completions", prompt="abc", stream=stream, **fields):
        check("openai", "CreateCompletionResponse", without_nulls(answer) if stream else answer)


def test_models_and_errors(live: Live) -> None:
    check("openai", "ListModelsResponse", httpx.get(f"{live.url}/v1/models").json())
    for path in ("chat/completions", "completions", "responses"):
        error = httpx.post(f"{live.url}/v1/{path}", json={}).json()
        check("openai", "ErrorResponse", error)
