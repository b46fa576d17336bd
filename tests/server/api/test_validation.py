"""Bad bodies get a 400 with an OpenAI error, and never anything worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pla_serve.server.api.body import decode, validate
from pla_serve.server.api.params import grammar, sampling_params
from pla_serve.server.api.schema import ChatRequest, CompletionRequest
from pla_serve.server.errors import ApiError
from pla_serve.server.generation.defaults import SamplingDefaults
from tests.server.server_harness import MODEL, Live

CHAT = {"messages": [{"role": "user", "content": "x"}]}
TEXT = {"prompt": "x"}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def called(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "c", **function(**fields)}]}


TOOL = function()

BAD_CHAT = [
    ({"messages": []}, "messages"),
    ({}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({**CHAT, "temperature": "1"}, "temperature"),
    ({**CHAT, "temperature": -0.1}, "temperature"),
    ({**CHAT, "temperature": True}, "temperature"),
    ({**CHAT, "top_p": -0.1}, "top_p"),
    ({**CHAT, "top_k": 1.5}, "top_k"),
    ({**CHAT, "n": 0}, "n"),
    ({**CHAT, "n": 10**40}, "n"),
    ({**CHAT, "max_tokens": 0}, "max_tokens"),
    ({**CHAT, "max_tokens": -1}, "max_tokens"),
    ({**CHAT, "max_tokens": 1e300}, "max_tokens"),
    ({**CHAT, "seed": 2**63}, "seed"),
    ({**CHAT, "stop": [""]}, "stop"),
    ({**CHAT, "stop": ["x"] * 17}, "stop"),
    ({**CHAT, "stop": [1]}, "stop"),
    ({**CHAT, "stop_token_ids": [-1]}, "stop_token_ids"),
    ({**CHAT, "stop_token_ids": [True]}, "stop_token_ids"),
    ({**CHAT, "stop_token_ids": [99999]}, "stop_token_ids"),
    ({**CHAT, "logit_bias": {"x": 1}}, "logit_bias"),
    ({**CHAT, "logit_bias": {"-1": 1}}, "logit_bias"),
    ({**CHAT, "logit_bias": {"99999": 1}}, "logit_bias"),
    ({**CHAT, "logit_bias": {"\u0661": 1}}, "logit_bias"),
    ({**CHAT, "logit_bias": {"1": 101}}, "logit_bias"),
    ({**CHAT, "logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
    ({**CHAT, "priority": -(2**31)}, "priority"),
    ({**CHAT, "top_logprobs": 2}, "top_logprobs"),
    ({**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({**CHAT, "stream_options": {"include_usage": True}}, "stream_options"),
    ({**CHAT, "min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    ({**CHAT, "ttft_slo_ms": 0}, "ttft_slo_ms"),
    ({**CHAT, "tpot_slo_ms": 0.5}, "tpot_slo_ms"),
    ({**CHAT, "tpot_slo_ms": 1e7}, "tpot_slo_ms"),
    ({**CHAT, "response_format": {"type": "xml"}}, "response_format"),
    ({**CHAT, "response_format": {"type": "json_schema"}}, "response_format"),
    ({**CHAT, "guided_json": "{"}, None),
    ({**CHAT, "guided_regex": "a", "response_format": {"type": "json_object"}}, None),
    ({**CHAT, "structured_outputs": {}}, "structured_outputs"),
    ({**CHAT, "continue_final_message": True}, "continue_final_message"),
    ({**CHAT, "tools": [{"type": "function"}]}, "tools"),
    ({**CHAT, "tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
    ({**CHAT, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({**CHAT, "tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
    ({**CHAT, "tools": [TOOL, TOOL]}, "tools"),
    ({**CHAT, "tools": [TOOL] * 129}, "tools"),
    ({**CHAT, "tools": [function(parameters={"type": "array"})]}, "tools"),
    ({**CHAT, "tool_choice": "required"}, "tool_choice"),
    ({**CHAT, "tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
    ({**CHAT, "tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({**CHAT, "tools": [TOOL], "tool_choice": named("g")}, "tool_choice"),
    ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages"),
    ({"messages": [called(arguments="[" * 100_000), *CHAT["messages"]]}, None),
    ({"messages": [called(arguments="[1]"), *CHAT["messages"]]}, "messages"),
    ({"messages": [called(arguments='{"a"'), *CHAT["messages"]]}, None),
    ({"messages": [{**called(arguments="{}"), "role": "user", "content": "x"}]}, "messages"),
]
UNSUPPORTED_CHAT = [
    ({"messages": [{"role": "user", "content": "x", "hat": 1}]}, "messages.0.hat"),
    ({**CHAT, "colour": "red"}, "colour"),
    ({**CHAT, "functions": []}, "functions"),
    ({**CHAT, "best_of": 2}, "best_of"),
    ({**CHAT, "tools": [TOOL], "tool_choice": "none"}, "tools"),
    ({**CHAT, "tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({**CHAT, "tools": [{**TOOL, "hat": 1}]}, "tools.0.hat"),
    ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages"),
    ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
    ),
    ({**CHAT, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
]
BAD_TEXT = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [99999]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"prompt": ["a"] * 200, "n": 2}, "n"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
]
UNSUPPORTED_TEXT = [
    ({"prompt": "x", "suffix": "y"}, "suffix"),
    ({"prompt": "x", "best_of": 3, "n": 2}, "best_of"),
]


def post(live: Live, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/{path}", json=body)


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("chat/completions", *case) for case in BAD_CHAT] + [("completions", *c) for c in BAD_TEXT],
    ids=str,
)
def test_bad_bodies(live: Live, path: str, body: Any, param: str | None) -> None:
    response = post(live, path, body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [("chat/completions", *case) for case in UNSUPPORTED_CHAT]
    + [("completions", *case) for case in UNSUPPORTED_TEXT],
    ids=str,
)
def test_unsupported_is_named(live: Live, path: str, body: Any, param: str | None) -> None:
    response = post(live, path, body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == param


def test_a_priority_is_taken_where_it_is_enabled(live: Live, serve: Callable[..., Live]) -> None:
    refused = post(live, "chat/completions", {**CHAT, "priority": 1})
    assert "--enable-priority" in error_of(refused)["message"]
    assert post(live, "chat/completions", {**CHAT, "priority": 0}).status_code == 200
    body = {**CHAT, "priority": -3, "max_tokens": 2}
    assert post(serve(enable_priority=True), "chat/completions", body).status_code == 200


def test_fields_without_effect_are_accepted(live: Live) -> None:
    extra = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "logprobs": False,
        "top_logprobs": 0,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "tool_choice": "auto",
        "modalities": ["text"],
        "response_format": {"type": "text"},
        "best_of": 1,
        "logit_bias": {},
        "stop": None,
        "max_tokens": 2,
    }
    assert post(live, "chat/completions", {**CHAT, **extra}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"\xff\xfe",
        b'{"prompt": "x"} {"prompt": "y"}',
        b"[" * 100_000,
        b'{"prompt":' * 5_000 + b"1" + b"}" * 5_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_not_json_is_said_so(live: Live, body: bytes) -> None:
    response = httpx.post(
        f"{live.url}/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    error_of(response)


def test_other_content_types_are_refused(live: Live) -> None:
    response = httpx.post(f"{live.url}/v1/completions", data={"prompt": "x"})
    assert response.status_code == 415
    error_of(response)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/nowhere", 404), ("GET", "/v1/completions", 405)],
)
def test_unknown_routes(live: Live, method: str, path: str, status: int) -> None:
    response = httpx.request(method, live.url + path)
    assert response.status_code == status
    error_of(response)


def test_errors_do_not_repeat_huge_input(live: Live) -> None:
    response = post(live, "chat/completions", {**CHAT, "x" * 100_000: 1, "model": MODEL})
    assert response.status_code == 400
    assert len(response.content) < 2_000


def attempt(call: Callable[[], Any]) -> tuple[ApiError | None, Any]:
    """The error that the client would see, or the result."""
    try:
        return None, call()
    except ApiError as error:
        return error, None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner),
    max_leaves=8,
)


@pytest.mark.parametrize(("model", "base"), [(ChatRequest, CHAT), (CompletionRequest, TEXT)])
@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_of_any_field_is_taken_or_refused(model: Any, base: Any, data: Any) -> None:
    names = sorted(field.alias or name for name, field in model.model_fields.items())
    body = {**base, **data.draw(st.dictionaries(st.sampled_from(names), json_values, max_size=3))}
    refused, request = attempt(lambda: validate(body, model))
    if refused is None:
        refused, params = attempt(lambda: sampling_params(request, 8, 100, SamplingDefaults()))
    if refused is not None:
        assert refused.status == 400
        assert len(refused.message) < 2_000
        return
    assert 0 <= params.temperature <= 100
    assert 0 < params.top_p <= 1
    assert params.top_k >= 0
    assert all(0 <= token < 100 for token in params.stop_token_ids)
    assert all(0 <= token < 100 for token in params.logit_bias or ())
    assert grammar(request) == params.grammar
    msgspec.msgpack.encode(params)


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(body: bytes) -> None:
    refused, _ = attempt(lambda: decode(body))
    assert refused is None or refused.status == 400


ROUTERS_ADD = {
    "logprobs": False,
    "no_stop_trim": False,
    "ignore_eos": False,
    "continue_final_message": False,
    "skip_special_tokens": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
    "include_reasoning": True,
}
"""What sglang-router 0.3.2 and vllm-router 0.1.17 add to every request."""


def test_requests_may_come_through_the_routers_of_others(live: Live) -> None:
    messages = [{"role": "user", "content": "abc"}]
    response = post(live, "chat/completions", {"messages": messages, **ROUTERS_ADD})
    assert response.status_code == 200, response.text
    own = {"logprobs", "continue_final_message"}
    body = {"prompt": "abc", "echo": False}
    body |= {name: value for name, value in ROUTERS_ADD.items() if name not in own}
    assert post(live, "completions", body).status_code == 200


def test_hidden_states_are_not_promised(live: Live) -> None:
    response = post(live, "completions", {"prompt": "abc", "return_hidden_states": True})
    assert response.status_code == 400
