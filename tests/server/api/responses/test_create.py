"""``POST /v1/responses``: answers, streams, tools, forms and refusals, with an engine that echoes.

The template shows the last message, so that is what the answer is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import httpx
import pytest

from tests.server.api.responses.published import check_answer, check_event, check_order
from tests.server.fake_core import ERROR_SEED, REJECT_SEED
from tests.server.server_harness import MODEL, Live

ECHO_LAST = "{# tools #}{{ messages[-1].content }}"
SHOW_ALL = "{# tools #}{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
EFFORT = ECHO_LAST + "{% if reasoning_effort %} {{ reasoning_effort }}{% endif %}"
THOUGHT = "<think>\nhm, Paris\n</think>\n\n"
PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TWO = f"Let me look.\n{PARIS}\n{PARIS.replace('Paris', 'Rome')}"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def hermes() -> Iterator[Live]:
    live = Live(tool_parser="hermes", chat_template=ECHO_LAST, context=2048)
    live.wait_ready()
    yield live
    live.close()


@pytest.fixture(scope="module")
def thinks() -> Iterator[Live]:
    live = Live(tool_parser="hermes", reasoning_parser="qwen3", chat_template=EFFORT, context=2048)
    live.wait_ready()
    yield live
    live.close()


@pytest.fixture(scope="module")
def shown() -> Iterator[Live]:
    """A server whose template shows the whole conversation."""
    live = Live(tool_parser="hermes", chat_template=SHOW_ALL, context=2048)
    live.wait_ready()
    yield live
    live.close()


def ask(live: Live, given: Any, **fields: Any) -> dict[str, Any]:
    found = httpx.post(f"{live.url}/v1/responses", json={"input": given, **fields}, timeout=20)
    assert found.status_code == 200, found.text
    content: dict[str, Any] = found.json()
    check_answer(content)
    return content


def stream(live: Live, given: Any, **fields: Any) -> list[dict[str, Any]]:
    body = {"input": given, "stream": True, **fields}
    found = httpx.post(f"{live.url}/v1/responses", json=body, timeout=20)
    assert found.status_code == 200, found.text
    assert found.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in found.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
        check_event(events[-1])
    check_order(events)
    return events


def refuse(live: Live, status: int = 400, **fields: Any) -> dict[str, Any]:
    found = httpx.post(f"{live.url}/v1/responses", json={"input": "x", **fields}, timeout=20)
    assert found.status_code == status, found.text
    error: dict[str, Any] = found.json()["error"]
    return error


def texts(answer: dict[str, Any]) -> list[str]:
    return [part["text"] for item in answer["output"] for part in item.get("content", ())]


def test_a_text_is_answered(hermes: Live) -> None:
    answer = ask(hermes, "hello", metadata={"a": "b"}, user="u", temperature=0)
    (message,) = answer["output"]
    assert message["role"] == "assistant"
    assert message["status"] == "completed"
    assert texts(answer) == ["hello"]
    assert answer["status"] == "completed"
    assert answer["model"] == MODEL
    assert answer["metadata"] == {"a": "b"}
    assert answer["temperature"] == 0
    assert answer["usage"]["input_tokens"] == 5
    assert answer["usage"]["output_tokens"] == 6
    assert answer["usage"]["total_tokens"] == 11


def test_a_stream_has_the_events_of_openai(hermes: Live) -> None:
    events = stream(hermes, "hi")
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for kind, _ in groupby(kinds)] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert texts(events[-1]["response"]) == ["hi"]


def test_calls_are_items(hermes: Live) -> None:
    answer = ask(hermes, TWO, tools=[WEATHER])
    message, first, second = answer["output"]
    assert message["content"][0]["text"] == "Let me look."
    assert [call["type"] for call in (first, second)] == ["function_call"] * 2
    assert json.loads(first["arguments"]) == {"city": "Paris"}
    assert json.loads(second["arguments"]) == {"city": "Rome"}
    assert first["call_id"].startswith("call_")
    assert first["call_id"] != second["call_id"]
    assert answer["tools"] == [{**WEATHER, "strict": None}]
    assert answer["tool_choice"] == "auto"


def test_streamed_calls_are_the_same(hermes: Live) -> None:
    whole = ask(hermes, TWO, tools=[WEATHER])["output"]
    streamed = stream(hermes, TWO, tools=[WEATHER])[-1]["response"]["output"]
    for one, other in zip(whole, streamed, strict=True):
        assert {**one, "id": 0, "call_id": 0} == {**other, "id": 0, "call_id": 0}
    events = stream(hermes, PARIS, tools=[WEATHER])
    kinds = {event["type"].removeprefix("response.") for event in events}
    assert {"function_call_arguments.delta", "function_call_arguments.done"} <= kinds
    assert "output_text.delta" not in kinds


def test_one_call_at_most(hermes: Live) -> None:
    kinds = [
        item["type"]
        for item in ask(hermes, TWO, tools=[WEATHER], parallel_tool_calls=False)["output"]
    ]
    assert kinds == ["message", "function_call"]


def test_a_named_function_is_called(hermes: Live) -> None:
    named = {"type": "function", "name": "get_weather"}
    answer = ask(hermes, PARIS, tools=[WEATHER], tool_choice=named)
    assert answer["tool_choice"] == named


def test_a_group_of_functions(hermes: Live) -> None:
    group = {"type": "namespace", "name": "maps", "description": "d", "tools": [WEATHER]}
    called = PARIS.replace("get_weather", "maps__get_weather")
    answer = ask(hermes, called, tools=[group])
    (call,) = answer["output"]
    assert (call["namespace"], call["name"]) == ("maps", "get_weather")
    assert answer["tools"] == [{**group, "tools": [{**WEATHER, "strict": None}]}]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    assert texts(ask(hermes, [call, result], tools=[group])) == ["sunny"]


def test_a_search_of_openais_is_not_offered(hermes: Live) -> None:
    tools = [{"type": "web_search", "external_web_access": True}, WEATHER]
    body = {"input": "hi", "tools": tools}
    found = httpx.post(f"{hermes.url}/v1/responses", json=body, timeout=20)
    assert [tool["type"] for tool in found.json()["tools"]] == ["function"]
    assert "web_search was not offered" in found.headers["warning"]
    error = refuse(hermes, tools=[{"type": "web_search"}], tool_choice="required")
    assert error["param"] == "tool_choice"


def test_an_answer_cut_short_is_incomplete(hermes: Live) -> None:
    answer = ask(hermes, "hello", max_output_tokens=2)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    events = stream(hermes, "hello", max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete"


def test_an_empty_answer_is_an_empty_message(hermes: Live) -> None:
    events = stream(hermes, [{"role": "user", "content": "x"}], stop="x")
    assert texts(events[-1]["response"]) == [""]


def test_log_probabilities(hermes: Live) -> None:
    include = ["message.output_text.logprobs"]
    (part,) = ask(hermes, "hi", include=include, top_logprobs=2)["output"][0]["content"]
    assert [entry["token"] for entry in part["logprobs"][:2]] == ["h", "i"]
    assert [len(entry["top_logprobs"]) for entry in part["logprobs"]] == [2, 2, 2]
    events = stream(hermes, "hi", include=include)
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    assert [entry["token"] for logprobs in deltas for entry in logprobs][:2] == ["h", "i"]
    assert ask(hermes, "hi")["output"][0]["content"][0]["logprobs"] == []


def test_items_become_messages(shown: Live) -> None:
    answer = ask(
        shown,
        [
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": "Yes?", "annotations": [], "logprobs": []}
                ],
            },
            {"role": "user", "content": "Weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None},
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
        ],
        instructions="You are a cat.",
    )
    assert texts(answer) == [
        "[system:You are a cat.\n\nBe brief.][user:Hi][assistant:Yes?][user:Weather?]"
        "[assistant:][tool:sunny]"
    ]


def test_a_schema_holds_the_answer(hermes: Live) -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    answer = ask(hermes, "x", text={"format": form})
    assert texts(answer) == ['{"grammar": "json_schema"}']
    assert answer["text"]["format"] == form
    assert texts(ask(hermes, "x", text={"format": {"type": "json_object"}})) == [
        '{"grammar": "json_object"}'
    ]
    bad = {**form, "schema": {"type": "nonsense"}}
    assert refuse(hermes, text={"format": bad})["param"] == "text"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"input": [{"type": "computer_call_output"}]}, "input"),
        ({"input": [{"type": "reasoning", "encrypted_content": "abc"}]}, "input"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True, "stream": True}, "background"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    hermes: Live, fields: dict[str, Any], param: str
) -> None:
    error = refuse(hermes, **fields)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": 3}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_p": 3}, "top_p"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True, "store": False}, "background"),
    ],
)
def test_mistakes_name_the_field_of_this_api(
    hermes: Live, fields: dict[str, Any], param: str
) -> None:
    error = refuse(hermes, **fields)
    assert error["param"] == param
    assert "max_tokens" not in error["message"]


def test_a_function_of_a_name_that_nobody_may_send_ends_the_conversation(hermes: Live) -> None:
    """The model chose the name, and the stored item cannot be read again."""
    call = PARIS.replace("get_weather", "n" * 300)
    first = ask(hermes, call, tools=[WEATHER])
    assert first["output"][0]["name"] == "n" * 300
    error = refuse(hermes, input="x", previous_response_id=first["id"])
    assert error["param"] == "previous_response_id"
    assert "256 characters" in error["message"]


def test_a_long_list_of_callers_is_one_mistake(hermes: Live) -> None:
    """Each of them was an error of its own, which took 10 microseconds."""
    tool = {**WEATHER, "allowed_callers": ["nobody"] * 1_000}
    assert "at most 1 item" in refuse(hermes, input="x", tools=[tool])["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"a": "x" * 513}},
        {"metadata": {"x" * 65: "a"}},
        {"user": "x" * 1025},
        {"safety_identifier": "x" * 1025},
        {"prompt_cache_key": "x" * 1025},
    ],
    ids=["value", "key", "user", "safety", "cache"],
)
def test_what_an_answer_repeats_is_bounded(hermes: Live, fields: dict[str, Any]) -> None:
    """Nothing counts it any more once the engine has taken the request."""
    assert refuse(hermes, input="x", **fields)["param"] in fields


def test_a_model_of_another_name_is_unknown(hermes: Live) -> None:
    assert refuse(hermes, 404, model="other")["code"] == "model_not_found"


def test_refusals_of_the_engine_keep_their_status(hermes: Live) -> None:
    assert refuse(hermes, 429, seed=REJECT_SEED)["code"] == "rate_limit_exceeded"
    assert refuse(hermes, 429, seed=REJECT_SEED, stream=True)["code"] == "rate_limit_exceeded"


def test_a_failure_within_a_stream_is_an_event(hermes: Live) -> None:
    events = stream(hermes, "hello", seed=ERROR_SEED)
    assert events[-1]["type"] == "response.failed"
    answer = events[-1]["response"]
    assert answer["error"]["code"] == "server_error"
    assert answer["status"] == "failed"
    assert refuse(hermes, 500, seed=ERROR_SEED)["type"] == "server_error"


def test_reasoning_is_an_item_of_its_own(thinks: Live) -> None:
    reasoning, message = ask(thinks, THOUGHT + "Yes.")["output"]
    assert reasoning["type"] == "reasoning"
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm, Paris"}]
    assert reasoning["summary"] == []
    assert message["content"][0]["text"] == "Yes."
    events = stream(thinks, THOUGHT + TWO, tools=[WEATHER])
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    kinds = {event["type"].removeprefix("response.") for event in events}
    assert {"reasoning_text.delta", "reasoning_text.done"} <= kinds
    used = events[-1]["response"]["usage"]["output_tokens_details"]["reasoning_tokens"]
    assert used == len("\nhm, Paris\n")


def test_an_answer_cut_within_its_reasoning(thinks: Live) -> None:
    answer = ask(thinks, THOUGHT, max_output_tokens=12)
    (reasoning,) = answer["output"]
    assert reasoning["status"] == answer["status"] == "incomplete"


def test_the_effort_reaches_the_template(thinks: Live) -> None:
    answer = ask(thinks, "x", reasoning={"effort": "low", "summary": "auto"})
    assert texts(answer) == ["x low"]
    assert answer["reasoning"]["effort"] == "low"
    assert refuse(thinks, reasoning={"effort": "much"})["param"] == "reasoning.effort"


def test_reasoning_that_is_sent_back_reaches_the_template(serve: Callable[..., Live]) -> None:
    each = "[{{ m.role }} {{ m.reasoning_content }}|{{ m.content }}]"
    shows = "{% for m in messages %}" + each + "{% endfor %}"
    live = serve(chat_template=shows)
    items = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "c"}]},
        {"role": "user", "content": "d"},
    ]
    assert texts(ask(live, items)) == ["[assistant a|b][assistant c|][user |d]"]
