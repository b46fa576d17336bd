"""Errors of ``/v1/messages``: what is refused, in which words, and what the client raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import pytest

from tests.server import published
from tests.server.api.test_anthropic import ECHO_LAST, MODEL, ask, connect
from tests.server.server_harness import Live

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    live = Live(chat_template=ECHO_LAST, api_keys=("secret",), max_body_mib=0.01)
    live.wait_ready()
    yield live
    live.close()


def refused(
    client: anthropic.Anthropic, kind: type[anthropic.APIStatusError], **fields: Any
) -> str:
    """What an error says, which has Anthropic's shape and a request's id."""
    with pytest.raises(kind) as caught:
        ask(client, "x", **fields)
    body: Any = caught.value.body
    published.check("anthropic", "ErrorResponse", body)
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert set(body["error"]) == {"type", "message"}
    assert body["request_id"] == caught.value.request_id
    return f"{body['error']['type']}: {body['error']['message']}"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "type image are not supported"),
        ({"system": [IMAGE]}, "type image are not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice needs a name"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "less than max_tokens"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens must be given"),
        ({"extra_body": {"container": "c"}}, "container"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "text.text: Field required",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "a string or a list of blocks"),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "mcp_servers"),
        (
            {
                "extra_body": {
                    "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}
                }
            },
            "clear_tool_uses_20250919",
        ),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": []}]}, "say nothing"),
        ({"messages": [{"role": "assistant", "content": []}]}, "say nothing"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
                    }
                ]
            },
            "no text that an answer could continue",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
                    }
                ]
            },
            "tool_use block stands in a message of role user",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}
                ]
            },
            "not user",
        ),
    ],
)
def test_bad_requests(guarded: Live, fields: Any, said: str) -> None:
    with connect(guarded, api_key="secret") as client:
        message = refused(client, anthropic.BadRequestError, **fields)
    assert message.startswith("invalid_request_error: ")
    assert said in message


def test_max_tokens_is_required(guarded: Live) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    answer = httpx.post(f"{guarded.url}/v1/messages", json=body, headers={"x-api-key": "secret"})
    assert answer.status_code == 400
    assert "max_tokens" in answer.json()["error"]["message"]


def test_errors_of_every_status(guarded: Live) -> None:
    with connect(guarded, api_key="wrong") as client:
        said = refused(client, anthropic.AuthenticationError)
        assert said.startswith("authentication_error: ")
    with connect(guarded, api_key="secret") as client:
        said = refused(client, anthropic.NotFoundError, model="other")
        assert said.startswith("not_found_error: ")
        with pytest.raises(anthropic.ContentTooLargeError, match="request_too_large"):
            ask(client, 20_000 * "x")
        with pytest.raises(anthropic.BadRequestError, match="context"):
            ask(client, 600 * "x")
    url, headers = f"{guarded.url}/v1/messages", {"x-api-key": "secret"}
    for answer, status, kind in (
        (httpx.get(url, headers=headers), 405, "invalid_request_error"),
        (httpx.post(f"{url}/batches", headers=headers, json={}), 404, "not_found_error"),
        (httpx.post(url, headers=headers, content=b"{"), 415, "invalid_request_error"),
    ):
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
        assert answer.headers["request-id"] == answer.json()["request_id"]


def test_a_bearer_token_serves_as_well(guarded: Live) -> None:
    with connect(guarded, api_key=None, auth_token="secret") as client:
        assert ask(client, "Hi").content[0].text == "Hi"


def test_other_paths_keep_their_errors(guarded: Live) -> None:
    answer = httpx.post(f"{guarded.url}/v1/chat/completions", headers={"x-api-key": "wrong"})
    assert answer.json()["error"]["code"] == "invalid_api_key"
    answer = httpx.get(f"{guarded.url}/v1/messagesque", headers={"x-api-key": "secret"})
    assert set(answer.json()) == {"error"}


def test_a_server_that_drains_is_overloaded(serve: Callable[..., Live]) -> None:
    live = serve(chat_template=ECHO_LAST)
    live.instance.traffic.draining = True
    with connect(live) as client:
        assert refused(client, anthropic.OverloadedError).startswith("overloaded_error: ")
    live.instance.traffic.draining = False
