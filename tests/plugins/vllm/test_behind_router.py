"""Plain vLLM servers behind the router: whatever a client may ask for, against the real vLLM.

Needs PLA_SERVE_TEST_MODEL, a folder with the model's weights, and PLA_SERVE_TEST_PROGRAM, the
``pla-serve`` of an environment with all of its dependencies (`make test-vllm` sets both).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.plugins.vllm.test_engine import FOLDER, served, wait_until_up

PROGRAM = os.environ.get("PLA_SERVE_TEST_PROGRAM")
pytestmark = pytest.mark.skipif(
    FOLDER is None or PROGRAM is None,
    reason="PLA_SERVE_TEST_MODEL or PLA_SERVE_TEST_PROGRAM is not set",
)
Json = dict[str, Any]
PROMPT = "The capital of France is"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
USER = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The router, and the vLLM server behind it."""
    folder = tmp_path_factory.mktemp("fleet")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log = folder / "router.log"
    with served(folder / "vllm.log") as vllm, log.open("wb") as out:
        words = ["route", str(FOLDER), "--instance", f"vllm+{vllm}", "--port", str(port)]
        words += ["--served-model-name", "model"]
        process = subprocess.Popen(
            [str(PROGRAM), *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until_up(url, process, log)
            yield url, vllm
        finally:
            process.terminate()
            process.wait(60)


def post(url: str, path: str, **body: Any) -> Json:
    answer = httpx.post(url + path, json={"model": "model", **body}, timeout=300, trust_env=False)
    assert answer.status_code == 200, answer.text
    found: Json = answer.json()
    return found


def complete(url: str, **body: Any) -> Json:
    wanted = {"prompt": PROMPT, "temperature": 0, **body}
    choice: Json = post(url, "/v1/completions", **wanted)["choices"][0]
    return choice


def tokens_of(url: str, text: str) -> list[int]:
    found: list[int] = post(url, "/tokenize", prompt=text)["tokens"]
    return found


def test_prompts_of_text_and_tokens(urls: tuple[str, str]) -> None:
    router, vllm = urls
    right = complete(vllm, max_tokens=8)["text"]
    assert complete(router, max_tokens=8)["text"] == right
    tokens = tokens_of(router, PROMPT)
    assert tokens == tokens_of(vllm, PROMPT)
    assert complete(router, prompt=tokens, max_tokens=8)["text"] == right


def test_stop_token_ids(urls: tuple[str, str]) -> None:
    router, vllm = urls
    third = tokens_of(router, complete(vllm, max_tokens=8)["text"])[2]
    wanted = {"max_tokens": 8, "stop_token_ids": [third]}
    right, got = complete(vllm, **wanted), complete(router, **wanted)
    assert got["text"] == right["text"]
    assert got["finish_reason"] == "stop"
    assert got["stop_reason"] == right["stop_reason"] == third


def test_logit_bias_and_stop_strings(urls: tuple[str, str]) -> None:
    router, vllm = urls
    [token] = tokens_of(router, " Rome")[:1]
    for wanted in ({"logit_bias": {str(token): 100}}, {"stop": [" "]}, {"stop": ["."]}):
        assert (
            complete(router, max_tokens=4, **wanted)["text"]
            == (complete(vllm, max_tokens=4, **wanted)["text"])
        )


def test_logprobs(urls: tuple[str, str]) -> None:
    router, vllm = urls
    right = complete(vllm, max_tokens=4, logprobs=3)["logprobs"]
    got = complete(router, max_tokens=4, logprobs=3)["logprobs"]
    assert got["tokens"] == right["tokens"]
    assert got["token_logprobs"] == pytest.approx(right["token_logprobs"], abs=1e-3)
    for one, other in zip(got["top_logprobs"], right["top_logprobs"], strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    messages = {
        "messages": USER,
        "temperature": 0,
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    chat = post(router, "/v1/chat/completions", **messages)
    for entry in chat["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_scored_prompts(urls: tuple[str, str], max_tokens: int) -> None:
    router, vllm = urls
    wanted = {"echo": True, "logprobs": 2, "max_tokens": max_tokens}
    right, got = complete(vllm, **wanted), complete(router, **wanted)
    assert got["text"] == right["text"]
    assert got["logprobs"]["token_logprobs"][0] is None
    assert got["logprobs"]["token_logprobs"][1:] == (
        pytest.approx(right["logprobs"]["token_logprobs"][1:], abs=1e-3)
    )
    assert got["logprobs"]["text_offset"] == right["logprobs"]["text_offset"]
    scores = {"prompt_logprobs": 2, "max_tokens": 1}
    right, got = complete(vllm, **scores), complete(router, **scores)
    assert got["prompt_logprobs"][0] is None
    for one, other in zip(got["prompt_logprobs"][1:], right["prompt_logprobs"][1:], strict=True):
        assert one.keys() == other.keys()
        for token, entry in one.items():
            assert entry["logprob"] == pytest.approx(other[token]["logprob"], abs=1e-3)
            assert entry["decoded_token"] == other[token]["decoded_token"]


@pytest.mark.parametrize(
    ("constraint", "check"),
    [
        ({"guided_regex": r"\d{4}"}, lambda text: text.isascii() and len(text) == 4),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, lambda text: text in ("yes", "no")),
        ({"response_format": {"type": "json_object"}}, lambda text: json.loads(text) is not None),
        (
            {"guided_json": {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 3}},
            lambda text: set(json.loads(text)) <= {1, 2},
        ),
        ({"guided_grammar": 'start: "a" | "b"'}, lambda text: text in ("a", "b")),
    ],
    ids=["regex", "choice", "object", "schema", "lark"],
)
def test_structured_output(urls: tuple[str, str], constraint: Json, check: Any) -> None:
    answer = complete(urls[0], max_tokens=60, **constraint)
    assert answer["finish_reason"] in ("stop", "length")
    if answer["finish_reason"] == "stop":
        assert check(answer["text"]), answer["text"]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_required_tools(urls: tuple[str, str], choice: Any) -> None:
    wanted = {
        "messages": USER,
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 80,
        "temperature": 0,
        "parallel_tool_calls": False,  # chance decides how many there are otherwise
    }
    answer = post(urls[0], "/v1/chat/completions", **wanted)["choices"][0]
    calls = answer["message"]["tool_calls"]
    assert answer["finish_reason"] == "tool_calls"
    assert {call["function"]["name"] for call in calls} == {"get_weather"}
    for call in calls:
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


def test_tools_that_may_be_called(urls: tuple[str, str]) -> None:
    wanted = {"messages": USER, "tools": [TOOL], "max_tokens": 40}
    message = post(urls[0], "/v1/chat/completions", **wanted)["choices"][0]["message"]
    for call in message.get("tool_calls") or ():
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_faults_of_requests_are_400_and_the_server_stays(urls: tuple[str, str]) -> None:
    router, _ = urls
    for wrong in (
        {"prompt": [10**6]},
        {"guided_regex": "("},
        {"stop_token_ids": [10**6]},
        {"max_tokens": 10**6},
    ):
        body = {"model": "model", "prompt": PROMPT, **wrong}
        answer = httpx.post(f"{router}/v1/completions", json=body, timeout=300, trust_env=False)
        assert answer.status_code == 400, answer.text
    assert complete(router, max_tokens=1)["text"]
