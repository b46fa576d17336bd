"""``/v1/messages`` through Anthropic's client, from an engine that echoes answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from pla_serve.server.api.anthropic.answer import MessageAnswer
from pla_serve.server.errors import failed
from pla_serve.server.tools.choice import BY_NAME
from tests.server import published
from tests.server.api.test_tool_calls import FAMILY_OF
from tests.server.server_harness import DEADLINE, MODEL, Live
from tests.server.tools.answers import FAMILIES, TOOLS, draw_answer

ECHO_LAST = "{# tools #}{{ messages[-1].content }}"
"""The engine echoes the prompt, so an answer is the last message as it stands."""
SHOW_ALL = (
    "{% for m in messages %}[{{ m.role }}]{{ m.reasoning_content }}|{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments }}){% endfor %}"
    "{% endfor %}{% if enable_thinking is defined %} on={{ enable_thinking }}{% endif %}"
    "{% if reasoning_effort %} effort={{ reasoning_effort }}{% endif %}"
    "{% if tools %} tools={{ tools | length }}{% endif %}"
)
OURS = ("object", "created", "owned_by", "root", "parent", "max_model_len")
"""Fields of a model that OpenAI's clients read."""
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
OFFERED: Any = [
    {"name": tool.name, "description": tool.description, "input_schema": tool.parameters}
    for tool in TOOLS.values()
]
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
THOUGHT = f"<think>\nhm\n</think>\n\nI look.\n{PARIS}"


def connect(live: Live, **options: Any) -> anthropic.Anthropic:
    fields: Any = {"api_key": "key", "max_retries": 0, "timeout": DEADLINE, **options}
    return anthropic.Anthropic(base_url=live.url, **fields)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    live = Live(
        tool_parser="hermes", reasoning_parser="qwen3", chat_template=ECHO_LAST, context=2048
    )
    live.wait_ready()
    yield live
    live.close()


@pytest.fixture(scope="module")
def hermes(server: Live) -> Iterator[anthropic.Anthropic]:
    with connect(server) as client:
        yield client


@pytest.fixture(scope="module")
def showing() -> Iterator[anthropic.Anthropic]:
    live = Live(chat_template=SHOW_ALL, reasoning_parser="qwen3")
    live.wait_ready()
    with connect(live) as client:
        yield client
    live.close()


def ask(client: anthropic.Anthropic, text: Any, **fields: Any) -> Any:
    messages: Any = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return client.messages.create(
        **{"model": MODEL, "max_tokens": 1000, "messages": messages, **fields}
    )


def raw(client: anthropic.Anthropic, text: str, **fields: Any) -> Any:
    """The JSON of an answer, checked against the client's types and the published description."""
    messages: Any = [{"role": "user", "content": text}]
    fields = {"model": MODEL, "max_tokens": 1000, "messages": messages, **fields}
    answer = client.messages.with_raw_response.create(**fields)
    found = json.loads(answer.text())
    published.check("anthropic", "Message", found)
    check(Message.model_validate(found, strict=True))
    return found


def events_of(client: anthropic.Anthropic, text: str, **fields: Any) -> list[Any]:
    """The events of a stream, each checked in the same way."""
    messages: Any = [{"role": "user", "content": text}]
    body = {"model": MODEL, "max_tokens": 1000, "messages": messages, "stream": True, **fields}
    headers = {"x-api-key": "key", "anthropic-version": "2023-06-01"}
    url = f"{str(client.base_url).rstrip('/')}/v1/messages"
    answer = httpx.post(url, json=body, headers=headers, timeout=DEADLINE)
    assert answer.status_code == 200, answer.text
    found = []
    for block in filter(None, answer.text.split("\n\n")):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("ping", "error"):
            published.check("anthropic", "MessageStreamEvent", event)
            check(EVENT.validate_python(event, strict=True))
        found.append(event)
    return found


def check(model: BaseModel, known: tuple[str, ...] = ()) -> None:
    """Nothing is there that the client's types do not know, but for what is ``known`` to us."""
    assert set(model.model_extra or ()) <= set(known), model
    for name in type(model).model_fields:
        value = getattr(model, name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, BaseModel):
                check(each)


def build(events: list[Any]) -> tuple[list[Any], Any]:
    """Content and ending of a stream, by Anthropic's rules; the order of events is checked."""
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message = events[0]["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    blocks: list[Any] = []
    parts: list[str] = []
    is_open = False
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open
            assert event["index"] == len(blocks)
            blocks.append(event["content_block"])
            parts.append("")
            is_open = True
        elif event["type"] == "content_block_delta":
            assert is_open
            assert event["index"] == len(blocks) - 1
            delta, block = event["delta"], blocks[-1]
            kinds = {
                "text": ("text_delta",),
                "thinking": ("thinking_delta", "signature_delta"),
                "tool_use": ("input_json_delta",),
            }
            assert delta["type"] in kinds[block["type"]]
            if delta["type"] == "signature_delta":
                block["signature"] = delta["signature"]
            elif delta["type"] == "input_json_delta":
                parts[-1] += delta["partial_json"]
            else:
                block[block["type"]] += delta[block["type"]]
        else:
            assert event["type"] == "content_block_stop"
            assert event["index"] == len(blocks) - 1
            is_open = False
    assert not is_open
    for block, text in zip(blocks, parts, strict=True):
        if block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
    return blocks, events[-2]


def without_ids(blocks: list[Any]) -> list[Any]:
    return [{name: block[name] for name in block if name != "id"} for block in blocks]


def test_text(hermes: anthropic.Anthropic) -> None:
    answer = raw(hermes, "Hello.")
    assert answer["content"] == [{"type": "text", "text": "Hello.", "citations": None}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["id"].startswith("msg-") or answer["id"].startswith("msg_")
    assert answer["usage"]["output_tokens"] == len("Hello.") + 1


@pytest.mark.parametrize("name", BY_NAME)
def test_a_family_whole_and_streamed(serve: Callable[..., Live], name: str) -> None:
    family, rng = FAMILIES[FAMILY_OF[name]], Random(5)
    live = serve(tool_parser=name, chat_template=ECHO_LAST, context=2048)
    with connect(live) as client:
        for _ in range(5):
            content, calls = draw_answer(rng, family)
            text = family.write(content, calls)
            if not text:
                continue
            answer = raw(client, text, tools=OFFERED)
            uses = [block for block in answer["content"] if block["type"] == "tool_use"]
            assert [(block["name"], block["input"]) for block in uses] == calls
            assert len({block["id"] for block in uses}) == len(uses)
            texts = [block["text"] for block in answer["content"] if block["type"] == "text"]
            assert "".join(texts).strip() == content
            assert answer["stop_reason"] == ("tool_use" if calls else "end_turn")
            blocks, ending = build(events_of(client, text, tools=OFFERED))
            assert without_ids(blocks) == without_ids(answer["content"])
            assert ending["delta"]["stop_reason"] == answer["stop_reason"]


def test_thinking_text_and_a_call(hermes: anthropic.Anthropic) -> None:
    answer = raw(hermes, THOUGHT, tools=OFFERED)
    thinking, text, call = answer["content"]
    assert (thinking["thinking"], text["text"]) == ("hm", "I look.")
    assert thinking["signature"]
    assert (call["name"], call["input"]) == ("get_weather", {"city": "Paris"})
    assert answer["usage"]["output_tokens_details"] == {"thinking_tokens": len("\nhm\n")}
    blocks, ending = build(events_of(hermes, THOUGHT, tools=OFFERED))
    assert without_ids(blocks) == without_ids(answer["content"])
    assert ending["usage"]["output_tokens"] == answer["usage"]["output_tokens"]


def test_the_clients_stream_helper(hermes: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": THOUGHT}]
    with hermes.messages.stream(
        model=MODEL, max_tokens=1000, messages=messages, tools=OFFERED
    ) as stream:
        assert "".join(stream.text_stream) == "I look."
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[2].input == {"city": "Paris"}
    assert message.stop_reason == "tool_use"
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == len(THOUGHT)


def test_a_loop_of_tools(hermes: anthropic.Anthropic) -> None:
    """The answer goes back as the client has it, with the results."""
    messages: Any = [{"role": "user", "content": THOUGHT}]
    first = ask(hermes, messages, tools=OFFERED)
    (call,) = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    messages += [
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    second = ask(hermes, messages, tools=OFFERED)
    assert (second.content[0].text, second.stop_reason) == ("sunny", "end_turn")
    messages[1]["content"] = [block.model_dump() for block in first.content]
    assert ask(hermes, messages, tools=OFFERED).content[0].text == "sunny"


def test_the_clients_tool_runner(hermes: anthropic.Anthropic) -> None:
    """It calls the function, sends the result back and ends with the model's text."""

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Weather of a city.

        Args:
            city: its name
        """
        return f"sunny in {city}"

    messages: Any = [{"role": "user", "content": PARIS}]
    runner = hermes.beta.messages.tool_runner(
        model=MODEL, max_tokens=1000, tools=[get_weather], messages=messages
    )
    block = runner.until_done().content[0]
    assert block.type == "text"
    assert block.text == "sunny in Paris"


def test_one_call_at_most(hermes: anthropic.Anthropic) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    answer = raw(hermes, f"{PARIS}\n{PARIS}", tools=OFFERED, tool_choice=choice)
    assert len(answer["content"]) == 1
    blocks, _ = build(events_of(hermes, f"{PARIS}\n{PARIS}", tools=OFFERED, tool_choice=choice))
    assert len(blocks) == 1


def test_without_choice_calls_are_text(hermes: anthropic.Anthropic) -> None:
    answer = raw(hermes, PARIS, tools=OFFERED, tool_choice={"type": "none"})
    assert answer["content"][0]["text"] == PARIS


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "now"}])
def test_a_required_call_is_a_grammar(hermes: anthropic.Anthropic, choice: Any) -> None:
    """The fake engine answers with the kind of the grammar that it gets."""
    answer = raw(hermes, "x", tools=OFFERED, tool_choice=choice)
    assert answer["content"][0]["text"] == '{"grammar": "lark"}'


def test_json_of_a_schema(hermes: anthropic.Anthropic) -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    answer = raw(hermes, "x", output_config={"format": form})
    assert answer["content"][0]["text"] == '{"grammar": "json_schema"}'


def test_how_answers_end(hermes: anthropic.Anthropic) -> None:
    cut = raw(hermes, "Hello", max_tokens=2)
    assert (cut["content"][0]["text"], cut["stop_reason"]) == ("He", "max_tokens")
    stopped = raw(hermes, "Hello", stop_sequences=["lo", "x"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "lo")
    assert stopped["content"][0]["text"] == "Hel"
    _, ending = build(events_of(hermes, "Hello", stop_sequences=["lo"]))
    assert (ending["delta"]["stop_reason"], ending["delta"]["stop_sequence"]) == (
        "stop_sequence",
        "lo",
    )


def test_more_tokens_than_the_context_has(hermes: anthropic.Anthropic) -> None:
    """Agents ask for tens of thousands; what does not fit is cut."""
    assert raw(hermes, "Hello", max_tokens=32_000)["stop_reason"] == "end_turn"
    assert raw(hermes, 1500 * "x", max_tokens=32_000)["stop_reason"] == "max_tokens"


def test_a_call_that_is_cut(hermes: anthropic.Anthropic) -> None:
    place = PARIS.index("ris")
    answer = raw(hermes, PARIS, tools=OFFERED, max_tokens=place)
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"][0]["name"] == "get_weather"
    assert isinstance(answer["content"][0]["input"], dict)


def test_an_empty_answer(hermes: anthropic.Anthropic) -> None:
    assert raw(hermes, "\n ")["content"] == []
    assert build(events_of(hermes, "\n "))[0] == []


def test_the_prompt(showing: anthropic.Anthropic) -> None:
    messages: Any = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "?"},
                {"type": "text", "text": "c"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "no", "is_error": True},
                {"type": "tool_result", "tool_use_id": "t2"},
                {"type": "text", "text": "d", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    system: Any = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1"},
        {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    said = ask(showing, messages, system=system).content[0].text
    assert said == (
        "[system]|Be kind.\nBe brief.[user]|a\nb[assistant]hm|cf({'x': 1})"
        "[tool]|Error: no[tool]|[user]|d"
    )


def test_a_prefilled_answer_is_continued(hermes: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Once"}]
    assert ask(hermes, messages).content[0].text == "Once"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"thinking": {"type": "disabled"}}, " on=False"),
        ({"thinking": {"type": "adaptive"}}, " on=True"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, " on=True"),
        ({"output_config": {"effort": "low"}}, " on=True effort=low"),
        ({"tools": OFFERED}, f" tools={len(OFFERED)}"),
        ({}, "[user]|x"),
    ],
)
def test_what_the_template_gets(showing: anthropic.Anthropic, fields: Any, expected: str) -> None:
    answer = ask(showing, "x", max_tokens=2000, **fields)
    assert answer.content[0].text.endswith(expected)


def test_reasoning_may_be_left_out(hermes: anthropic.Anthropic) -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    answer = raw(hermes, THOUGHT, thinking=thinking)
    assert [block["type"] for block in answer["content"]] == ["text"]
    assert answer["usage"]["output_tokens_details"]["thinking_tokens"] == 4


def test_what_is_accepted_and_changes_nothing(hermes: anthropic.Anthropic) -> None:
    answer = hermes.beta.messages.create(
        model=MODEL,
        max_tokens=10,
        messages=[{"role": "user", "content": "Hi"}],
        metadata={"user_id": "u"},
        service_tier="auto",
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
        betas=["context-management-2025-06-27"],
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    )
    assert answer.content[0].type == "text"


def test_counting_tokens(hermes: anthropic.Anthropic) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    answer = hermes.messages.count_tokens(model=MODEL, messages=messages, tools=OFFERED)
    check(MessageTokensCount.model_validate(answer.model_dump(), strict=True))
    assert answer.input_tokens == len("Hello")


def test_models(hermes: anthropic.Anthropic) -> None:
    cards = list(hermes.models.list())
    assert [card.id for card in cards] == [MODEL, "alias"]
    assert hermes.models.retrieve("alias").max_input_tokens == 2048
    for card in cards:
        check(card.model_copy(update={"capabilities": None}), known=OURS)


def test_a_stream_that_fails_ends_with_an_error(
    hermes: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> object:
        raise failed("the engine failed this request")

    monkeypatch.setattr(MessageAnswer, "_write", failing)
    *_, last = events_of(hermes, "Hello")
    assert last["type"] == "error"
    assert last["error"]["type"] == "api_error"
    published.check("anthropic", "ErrorResponse", last)


def test_cached_tokens(server: Live) -> None:
    with connect(server) as client:
        first, second = (ask(client, "said twice").usage for _ in range(2))
    assert (first.input_tokens, first.cache_read_input_tokens) == (len("said twice"), 0)
    assert (second.input_tokens, second.cache_read_input_tokens) == (1, len("said twice") - 1)
