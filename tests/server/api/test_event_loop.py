"""Bodies that used to hold the event loop: others are served while they are dealt with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from pla_serve.server.api.body import BodyReader
from pla_serve.server.errors import ApiError
from pla_serve.server.limits import Limits
from tests.server.server_harness import Live

MOST_LAG = 1.5
"""Seconds. Far more than any step may take, because test machines are shared; the bodies below held
the loop for 2 to 90 seconds."""
MIB = 2**20
HELLO = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def roomy() -> Iterator[Live]:
    server = Live(context=100_000)
    server.wait_ready()
    yield server
    server.close()


def big_choice() -> dict[str, object]:
    return {"prompt": ["x"] * 256, "guided_choice": ["a" * 7000 for _ in range(1000)]}


ATTACKS: dict[str, tuple[str, object]] = {
    "choice": ("completions", big_choice()),
    "many choices": (
        "completions",
        {"prompt": ["x"] * 256, "guided_choice": [f"{n:x}" for n in range(40_000)]},
    ),
    "numbers": ("completions", {"prompt": [7] * 3_000_000}),
    "bad numbers": ("completions", {"prompt": [-7] * 90_000}),
    "prompts": ("completions", {"prompt": [[7] * 900] * 256}),
    "lists": ("completions", {"prompt": [[]] * 1_000_000}),
    "echo": ("completions", {"prompt": [[65] * 700] * 250, "echo": True, "max_tokens": 1}),
    "word": ("completions", {"prompt": "a" * 8_000_000}),
    "spaces": ("completions", {"prompt": " " * 8_000_000}),
    "messages": ("chat/completions", {"messages": [HELLO] * 100_000}),
    "most messages": ("chat/completions", {"messages": [HELLO] * 2048, "max_tokens": 5}),
    "bad messages": ("chat/completions", {"messages": [{}] * 1_000_000}),
    "fields": ("chat/completions", {"messages": [HELLO], **{f"f{n}": 1 for n in range(300_000)}}),
    "bias": (
        "chat/completions",
        {"messages": [HELLO], "logit_bias": {str(n): "x" for n in range(45_000)}},
    ),
    "stops": ("chat/completions", {"messages": [HELLO], "stop": ["a"] * 1_000_000}),
    "kwargs": (
        "chat/completions",
        {"messages": [HELLO], "chat_template_kwargs": {f"f{n}": "x" for n in range(20_000)}},
    ),
    "parts": (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}]},
    ),
    "schema": (
        "chat/completions",
        {"messages": [HELLO], "guided_json": {"enum": ["x" * 1000] * 7000}},
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_the_event_loop_is_not_held(roomy: Live, name: str) -> None:
    path, body = ATTACKS[name]
    content = json.dumps(body, separators=(",", ":")).encode()[: 8 * MIB + 1]
    lag = roomy.instance.lag
    headers = {"content-type": "application/json"}
    url = f"{roomy.url}/v1/{path}"
    with httpx.Client(timeout=60) as client, ThreadPoolExecutor(1) as pool:
        client.get(f"{roomy.url}/health")
        lag.worst = 0.0
        answer = pool.submit(httpx.post, url, content=content, headers=headers, timeout=60)
        while not answer.done():
            assert client.get(f"{roomy.url}/health").status_code == 200
        assert answer.result().status_code in (200, 400, 413)
    assert lag.worst < MOST_LAG


def test_lag_is_in_the_metrics(roomy: Live) -> None:
    text = httpx.get(f"{roomy.url}/metrics").text
    assert "pla_serve:event_loop_lag_seconds_bucket" in text


@pytest.mark.parametrize("field", ["guided_regex", "guided_grammar", "guided_json"])
def test_a_constraint_is_bounded(live: Live, field: str) -> None:
    """Each of many sequences would carry it to the engine."""
    text = '{"enum": ["' + "x" * 200_000 + '"]}'
    body = {"prompt": ["a"] * 256, field: text}
    answer = httpx.post(f"{live.url}/v1/completions", json=body)
    assert answer.status_code == 400
    assert "131072 characters" in answer.json()["error"]["message"]


def test_arguments_of_a_tool_call_nested_deeply_are_the_clients_fault(live: Live) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000}}
    messages = [HELLO, {"role": "assistant", "tool_calls": [call]}, HELLO]
    answer = httpx.post(f"{live.url}/v1/chat/completions", json={"messages": messages})
    assert answer.status_code == 400
    assert "arguments" in answer.json()["error"]["message"]


@pytest.mark.parametrize("schema", ["[" * 100_000, "{" * 50, '{"a": 1e999}'])
def test_a_schema_that_is_no_json_is_the_clients_fault(live: Live, schema: str) -> None:
    body = {"messages": [HELLO], "guided_json": schema}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400


@pytest.mark.parametrize("penalty", [1e-320, 0.0, 1e-9, -1.0, 1e308])
def test_a_penalty_that_overflows_is_refused(live: Live, penalty: float) -> None:
    body = {"messages": [HELLO], "repetition_penalty": penalty}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400


def test_uploads_are_bounded_for_one_and_for_all() -> None:
    async def main() -> None:
        reader = BodyReader(8 * MIB, Limits(max_upload_bytes=8 * MIB))
        reader.hold("a", 4 * MIB)
        with pytest.raises(ApiError) as own:
            reader.hold("a", 1)
        reader.hold("b", 4 * MIB)
        with pytest.raises(ApiError) as total:
            reader.hold("c", 1)
        assert (own.value.status, total.value.status) == (429, 503)
        reader.hold("a", -4 * MIB)
        reader.hold("c", 4 * MIB)

    asyncio.run(main())


def test_uploads_are_given_back(serve) -> None:  # type: ignore[no-untyped-def]
    """Whatever becomes of their requests."""
    server = serve(limits=Limits(max_upload_bytes=2 * MIB))
    url = f"{server.url}/v1/completions"
    for _ in range(5):
        assert httpx.post(url, json={"prompt": "x" * 900_000}).status_code == 400
        assert httpx.post(url, json={"prompt": "a", "user": "x" * 900_000}).status_code == 200
    assert httpx.post(url, json={"prompt": "x" * 1_200_000}).status_code == 429
