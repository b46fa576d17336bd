"""Tool calls through the official client, from an engine that echoes answers of each family."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from random import Random
from typing import Any

import openai
import pytest

from pla_serve.server.tools.choice import BY_NAME
from tests.server.server_harness import MODEL, Live
from tests.server.tools.answers import FAMILIES, TOOLS, Call, draw_answer

ECHO_LAST = "{# tools #}{{ messages[-1].content }}"
"""The engine echoes the prompt, so an answer is the last message as it stands."""
FAMILY_OF = {
    "harmony": "harmony",
    "deepseek": "deepseek",
    "gemma4": "gemma_4",
    "function_gemma": "function_gemma",
    "mistral": "mistral_array",
    "qwen3_coder": "qwen_coder",
    "granite": "granite",
    "hermes": "hermes",
    "pythonic": "pythonic",
    "llama3_json": "llama_tag",
    "plain_json": "plain",
}
OFFERED = [
    {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.parameters,
        },
    }
    for tool in TOOLS.values()
]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = f"Let me look.\n{PARIS}\n{PARIS.replace('Paris', 'Rome')}"


@pytest.fixture(scope="module")
def hermes() -> Iterator[openai.OpenAI]:
    live = Live(tool_parser="hermes", chat_template=ECHO_LAST)
    live.wait_ready()
    with live.client() as client:
        yield client
    live.close()


def ask(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    fields = {"model": MODEL, "tools": OFFERED, **fields}
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **fields)


def calls_of(message: Any) -> list[Call]:
    calls = message.tool_calls or []
    return [(each.function.name, json.loads(each.function.arguments)) for each in calls]


def collect(stream: Any, index: int = 0) -> tuple[str, list[Call], str | None]:
    """Content, calls and finish reason of a stream, by the rules that OpenAI documents."""
    content, calls, finish = "", list[list[str]](), None
    for chunk in stream:
        for choice in chunk.choices:
            if choice.index != index:
                continue
            assert finish is None, "a chunk after the last one"
            content += choice.delta.content or ""
            for part in choice.delta.tool_calls or []:
                if part.id is not None:
                    assert part.index == len(calls)
                    assert part.type == "function"
                    assert part.function.arguments == ""
                    calls.append([part.function.name, ""])
                else:
                    assert part.function.name is None
                    calls[part.index][1] += part.function.arguments
            finish = choice.finish_reason
    return content, [(name, json.loads(text)) for name, text in calls], finish


def test_every_format_is_tried() -> None:
    assert set(FAMILY_OF) == set(BY_NAME)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_family_whole_and_streamed(serve: Callable[..., Live], name: str) -> None:
    family, rng = FAMILIES[FAMILY_OF[name]], Random(7)
    live = serve(tool_parser=name, chat_template=ECHO_LAST, context=2048)
    with live.client() as client:
        for _ in range(6):
            content, calls = draw_answer(rng, family)
            text = family.write(content, calls)
            if not text:
                continue
            choice = ask(client, text).choices[0]
            assert calls_of(choice.message) == calls
            assert (choice.message.content or "").rstrip() == content
            assert choice.finish_reason == ("tool_calls" if calls else "stop")
            if calls and not content:
                assert choice.message.content is None
            streamed = collect(ask(client, text, stream=True))
            whole = (choice.message.content or "", calls, choice.finish_reason)
            assert streamed == whole


def test_ids_differ_and_look_like_openais(hermes: openai.OpenAI) -> None:
    calls = ask(hermes, TWO).choices[0].message.tool_calls
    assert len({call.id for call in calls}) == 2
    assert all(call.id.startswith("call_") and call.type == "function" for call in calls)


def test_one_call_at_most(hermes: openai.OpenAI) -> None:
    choice = ask(hermes, TWO, parallel_tool_calls=False).choices[0]
    assert calls_of(choice.message) == [("get_weather", {"city": "Paris"})]
    stream = ask(hermes, TWO, parallel_tool_calls=False, stream=True)
    assert collect(stream)[1] == [("get_weather", {"city": "Paris"})]


def test_several_choices_have_readers_of_their_own(hermes: openai.OpenAI) -> None:
    answer = ask(hermes, TWO, n=3)
    assert [len(calls_of(choice.message)) for choice in answer.choices] == [2, 2, 2]
    chunks = list(ask(hermes, TWO, n=3, stream=True))
    assert [len(collect(chunks, index)[1]) for index in range(3)] == [2, 2, 2]


def test_with_tool_choice_none_calls_are_text(hermes: openai.OpenAI) -> None:
    choice = ask(hermes, PARIS, tool_choice="none").choices[0]
    assert choice.message.content == PARIS
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


def test_an_answer_without_calls_is_text(hermes: openai.OpenAI) -> None:
    choice = ask(hermes, "just text").choices[0]
    assert choice.message.content == "just text"
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


def test_an_answer_cut_short_ends_with_length(hermes: openai.OpenAI) -> None:
    assert ask(hermes, PARIS, max_tokens=60).choices[0].finish_reason == "length"


def test_logprobs_cover_every_token_once(hermes: openai.OpenAI) -> None:
    whole = ask(hermes, TWO, logprobs=True).choices[0].logprobs.content
    streamed = [
        entry
        for chunk in ask(hermes, TWO, logprobs=True, stream=True)
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole]
    assert len(whole) == len(TWO) + 1


def test_the_clients_own_message_comes_back(hermes: openai.OpenAI) -> None:
    """The second turn of every agent: the answer as it stands, and what the tools said."""
    message = ask(hermes, TWO).choices[0].message
    messages: list[Any] = [{"role": "user", "content": "?"}, message.model_dump()]
    messages += [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls
    ]
    messages.append({"role": "user", "content": "done"})
    answer = hermes.chat.completions.create(model=MODEL, messages=messages, tools=OFFERED)
    assert answer.choices[0].message.content == "done"


@cache
def own_message() -> dict[str, Any]:
    """All that clients are known to send back with a message of the assistant."""
    return {
        "role": "assistant",
        "id": "msg_1",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "parsed": {"a": 1},
        "reasoning_content": "hm",
        "cache_control": {"type": "ephemeral"},
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "index": 0,
                "function": {"name": "now", "arguments": "", "parsed_arguments": {}},
            }
        ],
    }


@pytest.mark.parametrize(
    "message",
    [own_message(), {**own_message(), "tool_calls": []}, {**own_message(), "tool_calls": None}],
    ids=["called", "empty", "null"],
)
def test_fields_that_say_nothing_are_accepted(
    hermes: openai.OpenAI, message: dict[str, Any]
) -> None:
    messages: list[Any] = [message, {"role": "user", "content": "ok", "name": None}]
    answer = hermes.chat.completions.create(
        model=MODEL,
        messages=messages,
        extra_body={
            **dict.fromkeys(("tools", "tool_choice", "parallel_tool_calls", "stop", "min_tokens"))
        },
    )
    assert answer.choices[0].message.content == "ok"


def test_the_clients_stream_helper(hermes: openai.OpenAI) -> None:
    with hermes.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": TWO}], tools=OFFERED
    ) as stream:
        done = [
            event.name for event in stream if event.type == "tool_calls.function.arguments.done"
        ]
        final = stream.get_final_completion()
    assert done == ["get_weather", "get_weather"]
    assert calls_of(final.choices[0].message) == [
        ("get_weather", {"city": "Paris"}),
        ("get_weather", {"city": "Rome"}),
    ]


def test_half_a_character_in_a_name_breaks_nothing(serve: Callable[..., Live]) -> None:
    live = serve(tool_parser="pythonic", chat_template=ECHO_LAST)
    text = r'[now(a="\ud83d")]'
    with live.client() as client:
        assert calls_of(ask(client, text).choices[0].message) == [("now", {"a": "\ufffd"})]
        assert collect(ask(client, text, stream=True))[1] == [("now", {"a": "\ufffd"})]


def test_markers_that_are_special_tokens_are_read_and_never_shown(
    serve: Callable[..., Live],
) -> None:
    live = serve(chat_template=ECHO_LAST + "{# [TOOL_CALLS] #}", special=("[TOOL_CALLS]",))
    text = 'Hm.[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    with live.client() as client:
        choice = ask(client, text).choices[0]
        assert (choice.message.content, calls_of(choice.message)) == ("Hm.", [("now", {})])
        assert collect(ask(client, text, stream=True)) == ("Hm.", [("now", {})], "tool_calls")
        plain = ask(client, text, tool_choice="none").choices[0].message.content
        assert plain == text.replace("[TOOL_CALLS]", "")


def test_a_template_without_tools_is_told_of_them(serve: Callable[..., Live]) -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    live = serve(chat_template=template, context=2048)
    with live.client() as client:
        content = ask(client, "hi", tools=OFFERED[2:]).choices[0].message.content
    assert content.startswith("<system>You can call these functions.")
    assert '"name": "now"' in content
    assert content.endswith("<user>hi")


def test_a_format_that_the_template_cannot_ask_for_is_refused() -> None:
    from pla_serve.server.tools.support import ToolSupport
    from tests.server.server_harness import make_tokenizer

    with pytest.raises(ValueError, match="shows no tools"):
        ToolSupport(make_tokenizer(), "{{ messages }}", "hermes")
    assert ToolSupport(make_tokenizer(), "{{ messages }}").format.name == "plain_json"


def test_a_required_call_is_held_to_a_grammar(hermes: openai.OpenAI) -> None:
    """The fake engine says which kind of grammar it was given."""
    for choice in ("required", {"type": "function", "function": {"name": "now"}}):
        answer = ask(hermes, "x", tool_choice=choice)
        assert answer.choices[0].message.content == '{"grammar": "lark"}'


def broken(**fields: Any) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"a": {"type": "nonsense"}}}
    return [{"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}]


def test_a_schema_that_cannot_be_compiled(hermes: openai.OpenAI) -> None:
    """Arguments are any object then, but for strict functions."""
    assert ask(hermes, "x", tools=broken()).choices[0].message.content == "x"
    required = ask(hermes, "x", tools=broken(), tool_choice="required")
    assert required.choices[0].message.content == '{"grammar": "lark"}'
    for choice in ("auto", "required"):
        with pytest.raises(openai.BadRequestError, match="nonsense") as caught:
            ask(hermes, "x", tools=broken(strict=True), tool_choice=choice)
        assert caught.value.param == "tools"


def test_constraints_beside_tools(hermes: openai.OpenAI) -> None:
    as_json = {"response_format": {"type": "json_object"}}
    assert ask(hermes, "x", **as_json).choices[0].message.content == '{"grammar": "lark"}'
    for fields in ({**as_json, "tool_choice": "required"}, {"extra_body": {"guided_regex": "a"}}):
        with pytest.raises(openai.BadRequestError):
            ask(hermes, "x", **fields)
