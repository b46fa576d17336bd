"""Requests in the forms in which clients, proxies and load balancers really send them."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from pla_serve.server.api.body import validate
from pla_serve.server.api.schema import ChatRequest, CompletionRequest
from pla_serve.server.api.tokenize import DetokenizeRequest
from pla_serve.server.errors import ApiError
from tests.server.server_harness import DEADLINE, MODEL, Live

CHAT = {"messages": [{"role": "user", "content": "x"}]}
TEXT = {"prompt": "abcdef"}


@pytest.mark.parametrize(
    ("model", "base", "field", "value"),
    [
        *[
            (model, base, field, 4.0)
            for model, base in ((ChatRequest, CHAT), (CompletionRequest, TEXT))
            for field in ("max_tokens", "min_tokens", "n", "top_k", "seed", "priority", "logprobs")
            if not (model is ChatRequest and field == "logprobs")
        ],
        (ChatRequest, CHAT, "max_completion_tokens", 4.0),
        (ChatRequest, {**CHAT, "logprobs": True}, "top_logprobs", 4.0),
        (CompletionRequest, TEXT, "best_of", 1.0),
        (CompletionRequest, TEXT, "stop_token_ids", [4.0, 5]),
        (CompletionRequest, {}, "prompt", [4.0, 5]),
        (CompletionRequest, {}, "prompt", [[4.0], [5]]),
        (DetokenizeRequest, {}, "tokens", [4.0, 5]),
    ],
)
def test_whole_numbers_may_have_a_point(model: Any, base: Any, field: str, value: Any) -> None:
    taken = getattr(validate({**base, field: value}, model), field)
    plain = json.loads(json.dumps(value).replace(".0", ""))
    assert taken == (
        plain if field != "prompt" else getattr(validate({field: plain}, model), field)
    )
    assert ".0" not in str(taken)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 4.5),
        ("max_tokens", "4"),
        ("max_tokens", True),
        ("stop_token_ids", [4.5]),
        ("stop_token_ids", [4.0, True]),
        ("prompt", [4.5]),
        ("prompt", [[4.0, [5]]]),
        ("prompt", [4.0, "x"]),
        ("seed", 1e300),
        ("echo", 1.0),
    ],
)
def test_other_values_may_not(field: str, value: Any) -> None:
    with pytest.raises(ApiError):
        validate({**TEXT, field: value}, CompletionRequest)


def test_numbers_that_are_no_whole_ones_stay() -> None:
    assert validate({**TEXT, "temperature": 1.0}, CompletionRequest).temperature == 1.0


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": False, "top_logprobs": 0},
        {"logprobs": None, "top_logprobs": None},
        {"stream": False, "stream_options": None},
        {"n": 1, "best_of": 1, "user": "somebody"},
        {"user": "", "stop": None, "logit_bias": None, "tools": None, "seed": None},
        {"top_p": 0},
    ],
)
def test_fields_that_change_nothing(live: Live, fields: dict[str, Any]) -> None:
    body = {"model": MODEL, **CHAT, **fields}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/v1/models", "/metrics"])
def test_head_is_get_without_the_body(live: Live, path: str) -> None:
    head, get = httpx.head(live.url + path), httpx.get(live.url + path)
    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_head_of_an_endpoint_for_posts(live: Live) -> None:
    answer = httpx.head(f"{live.url}/v1/completions")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "POST"


def test_stop_strings_before_min_tokens_are_text(live: Live) -> None:
    body = {"model": MODEL, "prompt": "ababab", "stop": "b", "min_tokens": 3}
    answer = httpx.post(f"{live.url}/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "aba"
    assert answer["choices"][0]["stop_reason"] == "b"


def ask_in_old_http(live: Live, body: dict[str, Any], *headers: str) -> tuple[str, bytes]:
    """Send a request of HTTP/1.0; return the head and all that follows until the end."""
    content = json.dumps({"model": MODEL, **body}).encode()
    head = "\r\n".join(
        [
            "POST /v1/completions HTTP/1.0",
            "content-type: application/json",
            f"content-length: {len(content)}",
            *headers,
        ]
    )
    with socket.create_connection(("127.0.0.1", live.port), DEADLINE) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    answered, _, rest = received.partition(b"\r\n\r\n")
    return answered.decode().lower(), rest


@pytest.mark.parametrize("headers", [(), ("connection: keep-alive",)])
def test_a_stream_to_a_client_of_http_1_0_has_no_chunks(
    live: Live, headers: tuple[str, ...]
) -> None:
    head, rest = ask_in_old_http(live, {**TEXT, "stream": True}, *headers)
    assert "transfer-encoding" not in head
    assert "connection: close" in head
    events = rest.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]]
    assert "".join(texts) == "abcdef"


def test_a_whole_answer_to_a_client_of_http_1_0(live: Live) -> None:
    head, rest = ask_in_old_http(live, TEXT)
    assert f"content-length: {len(rest)}" in head
    assert json.loads(rest)["choices"][0]["text"] == "abcdef"
