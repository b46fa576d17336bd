"""``/tokenize`` and ``/detokenize``: as vLLM answers them, with keys and bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from pla_serve.server.api.tokenize import most_tokens
from tests.server.server_harness import CONTEXT, MODEL, Live

KEY = "a key"


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
    """A server with an API key."""
    live = Live(api_keys=(KEY,))
    live.wait_ready()
    yield live
    live.close()


def post(live: Live, path: str, **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.post(f"{live.url}{path}", json=body, headers=headers, timeout=20.0)


def test_a_text_is_answered_as_vllm_does(locked: Live) -> None:
    answer = post(locked, "/tokenize", model=MODEL, prompt="Hi é")
    assert answer.status_code == 200
    assert answer.json() == {
        "count": 5,
        "max_model_len": CONTEXT,
        "tokens": list("Hi é".encode()),
        "token_strs": None,
    }
    spelled = post(locked, "/tokenize", prompt="Hi é", return_token_strs=True).json()
    assert spelled["token_strs"] == ["H", "i", "Ġ", "Ã", "©"]
    assert post(locked, "/tokenize", prompt="").json()["count"] == 0


def test_a_conversation_is_rendered_as_chat_would(locked: Live) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]

    def text(**fields: Any) -> str:
        answer = post(locked, "/tokenize", messages=messages, **fields)
        assert answer.status_code == 200, answer.text
        return bytes(answer.json()["tokens"]).decode()

    assert text() == "<user>Hi<assistant>Yo<assistant>"
    assert text(add_generation_prompt=False) == "<user>Hi<assistant>Yo"
    assert text(add_generation_prompt=False, continue_final_message=True).endswith("Yo")
    assert text(chat_template_kwargs={"mood": "!"}) == "<user>Hi<assistant>Yo<assistant>!"


@pytest.mark.parametrize("size", [1, 1000, 2040])
def test_tokens_become_the_text_again(locked: Live, size: int) -> None:
    """2,040 tokens are more than the context of 512: clients cut long texts with this."""
    text = "abcde fgh. "[:size] if size < 11 else ("abcde fgh. " * size)[:size]
    tokens = post(locked, "/tokenize", prompt=text).json()["tokens"]
    assert len(tokens) == size
    answer = post(locked, "/detokenize", model=MODEL, tokens=tokens)
    assert (answer.status_code, answer.json()) == (200, {"prompt": text})


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": []}, "messages"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools needs messages"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "a"}]}, "messages.0.role"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools.0"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "a"}]}, "no such role"),
        ("/tokenize", {"prompt": "a" * (4 * CONTEXT + 1)}, "more than 2048 tokens"),
        ("/tokenize", {"prompt": "a" * 3_000_000}, "more than 2048 tokens"),
        ("/detokenize", {"tokens": "a"}, "token ids"),
        ("/detokenize", {"tokens": [True]}, "token ids"),
        ("/detokenize", {"tokens": [-1]}, "not -1"),
        ("/detokenize", {"tokens": [2**70]}, "token ids must lie"),
        ("/detokenize", {"tokens": [65] * (4 * CONTEXT + 1)}, "at most 2048 tokens"),
    ],
)
def test_what_is_wrong_is_named(locked: Live, path: str, body: dict[str, Any], says: str) -> None:
    answer = post(locked, path, **body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_a_key_and_the_models_name_are_asked_for(locked: Live, path: str) -> None:
    fields = {"prompt": "a"} if path == "/tokenize" else {"tokens": [65]}
    bare = httpx.post(f"{locked.url}{path}", json=fields)
    assert (bare.status_code, bare.json()["error"]["code"]) == (401, "invalid_api_key")
    other = post(locked, path, model="another", **fields)
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")


def test_the_bound_is_four_contexts_a_quarter_million_or_the_context() -> None:
    assert [most_tokens(each) for each in (512, 100_000, 1_000_000)] == [2048, 250_000, 1_000_000]
