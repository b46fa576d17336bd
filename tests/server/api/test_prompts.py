"""From text to tokens: what it costs when it cannot fit, and what templates are told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.server.api.prompts import (
    PROBE_CHARACTERS_PER_TOKEN,
    PromptEncoder,
    check_tokens,
)
from pla_serve.server.api.schema import ChatRequest
from pla_serve.server.errors import ApiError
from tests.server.server_harness import make_tokenizer

TOKENIZER = make_tokenizer()


def encode(text: str, limit: int) -> list[int]:
    async def main() -> list[int]:
        encoder = PromptEncoder(TOKENIZER)
        try:
            return await encoder.text(text, limit=limit, add_special_tokens=True)
        finally:
            encoder.close()

    return asyncio.run(main())


@given(st.text(max_size=100))
def test_equals_the_tokenizers_own_encoding(text: str) -> None:
    assert encode(text, 10_000) == TOKENIZER.encode(text)


def test_a_text_that_just_fits_does() -> None:
    assert len(encode("x" * 5_000, 5_000)) == 5_000
    with pytest.raises(ApiError, match="5001"):
        encode("x" * 5_001, 5_000)


def test_a_hopeless_text_is_only_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    whole = PromptEncoder._ids

    def counting(self: PromptEncoder, text: str, special: bool) -> list[int]:
        seen.append(len(text))
        return whole(self, text, special)

    monkeypatch.setattr(PromptEncoder, "_ids", counting)
    with pytest.raises(ApiError, match="at least"):
        encode("x" * 1900, 100)
    assert seen == [PROBE_CHARACTERS_PER_TOKEN * 100]


def test_a_text_longer_than_its_tokens_can_be_is_not_even_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PromptEncoder, "_ids", lambda *_: pytest.fail("it was tokenised"))
    with pytest.raises(ApiError, match="at least"):
        encode("x" * 1_000_000, 100)


def test_long_texts_leave_the_event_loop_free() -> None:
    """While a long text is encoded the loop goes on: it turns at least once before the result."""

    async def main() -> None:
        encoder = PromptEncoder(TOKENIZER)
        work = asyncio.create_task(
            encoder.text("x" * 100_000, limit=200_000, add_special_tokens=True)
        )
        await asyncio.sleep(0)
        assert not work.done()
        assert len(await work) == 100_000
        encoder.close()

    asyncio.run(main())


@pytest.mark.parametrize(("tokens", "limit"), [([1, 2, 3], 2), ([-1], 9), ([100], 9)])
def test_bad_token_prompts(tokens: list[int], limit: int) -> None:
    with pytest.raises(ApiError) as caught:
        check_tokens(tokens, vocab_size=100, limit=limit)
    assert caught.value.status == 400


def render(template: Any, **fields: Any) -> str:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    tokenizer = make_tokenizer(template)
    encoder = PromptEncoder(tokenizer)
    try:
        return encoder.render(ChatRequest.model_validate(body))
    finally:
        encoder.close()


def test_tools_are_shown_where_the_template_shows_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields = {"tools": tools, "tool_choice": "none"}
    assert render("{{ tools[0].function.name }}", **fields) == "f"
    with pytest.raises(ApiError, match="does not show tools"):
        render("{{ messages[0].content }}", **fields)


def test_past_tool_calls_have_their_arguments_as_objects() -> None:
    messages = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "tool", "content": "r", "tool_call_id": "1"},
    ]
    template = "{{ messages[1].tool_calls[0].function.arguments.a }}{{ messages[1].content }}|"
    assert render(template, messages=messages) == "1|"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{ messages[7].content.x }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
    ],
)
def test_template_that_fails_is_the_requests_fault(template: str) -> None:
    with pytest.raises(ApiError) as caught:
        render(template)
    assert caught.value.status == 400


def test_default_of_several_templates() -> None:
    assert render({"default": "d", "tool_use": "t"}) == "d"


def test_developer_is_system_unless_the_template_knows_better() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", messages=messages) == "system"
    template = "{% if messages[0].role == 'developer' %}dev{% endif %}"
    assert render(template, messages=messages) == "dev"
