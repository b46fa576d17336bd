"""Log probabilities of prompts, as lm-eval and vLLM's clients ask for them."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from pla_serve.server.api.logprobs import TokenNames, completion_logprobs
from pla_serve.server.api.params import check_echoes
from pla_serve.server.errors import ApiError
from pla_serve.server.generation.detokenize import TokenBytes
from pla_serve.wire.engine import PromptLogprobs
from tests.server.server_harness import CONTEXT, DEADLINE, MODEL, Live, make_tokenizer


def complete(live: Live, **body: Any) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/completions", json={"model": MODEL, **body})


def test_a_prompt_is_scored_without_an_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="abcd", echo=True, logprobs=1, max_tokens=0
    )
    choice = answer.choices[0]
    assert choice.text == "abcd"
    assert choice.finish_reason == "length"
    assert choice.logprobs.tokens == ["a", "b", "c", "d"]
    assert choice.logprobs.token_logprobs == [None, -1, -2, -3]
    assert choice.logprobs.top_logprobs == [
        None,
        {"b": -1, "c": -0.5},
        {"c": -2, "d": -0.5},
        {"d": -3, "e": -0.5},
    ]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == 0
    assert answer.usage.total_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
def test_the_output_follows_the_prompt(client: openai.OpenAI, stream: bool) -> None:
    """What lm-eval sends; it reads the places of the prompt that the continuation has."""
    result = client.completions.create(
        model=MODEL, prompt=[97, 98, 99], echo=True, logprobs=0, max_tokens=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in result] if stream else [result.choices[0]]
    parts = [choice.logprobs for choice in choices]
    assert "".join(choice.text for choice in choices) == "abcab"
    assert [value for part in parts for value in part.token_logprobs] == [None, -1, -2, -0.5, -0.5]
    assert [place for part in parts for place in part.text_offset] == [0, 1, 2, 3, 4]
    assert [token for part in parts for token in part.tokens] == list("abcab")


def test_many_prompts_and_choices(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["ab", "cde"], n=2, echo=True, logprobs=0, max_tokens=0
    )
    assert [choice.text for choice in answer.choices] == ["ab", "ab", "cde", "cde"]
    found = [choice.logprobs.token_logprobs for choice in answer.choices]
    assert found == [[None, -1], [None, -1], [None, -1, -2], [None, -1, -2]]


def test_vllms_form_in_completions(live: Live) -> None:
    choice = complete(live, prompt="abc", prompt_logprobs=1, max_tokens=1).json()["choices"][0]
    assert choice["text"] == "a"
    assert choice["logprobs"] is None
    assert choice["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
            "99": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
        },
        {
            "99": {"logprob": -2.0, "rank": 2, "decoded_token": "c"},
            "100": {"logprob": -0.5, "rank": 1, "decoded_token": "d"},
        },
    ]


def test_vllms_form_in_chat(live: Live) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "prompt_logprobs": 0}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body).json()
    prompt = "<user>x<assistant>"
    assert answer["choices"][0]["message"]["content"] == prompt
    scores = answer["prompt_logprobs"]
    assert scores[0] is None
    assert [next(iter(each)) for each in scores[1:]] == [str(byte) for byte in prompt.encode()[1:]]


def test_both_forms_have_the_width_that_each_asks_for(live: Live) -> None:
    answer = complete(live, prompt="ab", echo=True, logprobs=1, prompt_logprobs=3, max_tokens=0)
    choice = answer.json()["choices"][0]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2
    assert len(choice["prompt_logprobs"][1]) == 4


def test_a_prompt_that_fills_the_context(live: Live) -> None:
    full = {"prompt": "x" * CONTEXT, "echo": True, "logprobs": 0}
    answer = complete(live, **full, max_tokens=0)
    assert len(answer.json()["choices"][0]["logprobs"]["tokens"]) == CONTEXT
    refused = complete(live, **full, max_tokens=1)
    assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"suffix": " end"}, "suffix"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0, "min_tokens": 1}, "min_tokens"),
    ],
)
def test_refusals(live: Live, body: dict[str, Any], param: str) -> None:
    answer = complete(live, prompt="abc", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_too_many_are_refused(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pla_serve.server.api.params.MOST_PROMPT_LOGPROBS", 20)
    answer = complete(live, prompt="x" * 11, prompt_logprobs=1)
    assert answer.status_code == 400
    assert "22 log probabilities" in answer.json()["error"]["message"]
    monkeypatch.setattr("pla_serve.server.api.params.MOST_HELD_LOGPROBS", 30)
    answer = complete(live, prompt=["x" * 10] * 2, prompt_logprobs=1)
    assert answer.status_code == 400
    assert "40 log probabilities" in answer.json()["error"]["message"]


def test_a_long_scored_prompt_is_written_in_a_thread(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pla_serve.server.api.answer.LONG", 10)
    for stream in (False, True):
        result = client.completions.create(
            model=MODEL, prompt="abcdef", echo=True, logprobs=0, max_tokens=1, stream=stream
        )
        choices = [chunk.choices[0] for chunk in result] if stream else [result.choices[0]]
        found = [value for choice in choices for value in choice.logprobs.token_logprobs]
        assert found == [None, -1, -2, -3, -4, -5, -0.5]


BYTES = TokenBytes(make_tokenizer(special=("<s>",)))
NAMES = TokenNames(BYTES)
EOS, BOS = 256, 257


def offsets(tokens: list[int], echo: str | None, prompt: list[int]) -> list[int]:
    counter = NAMES.offsets(prompt, echo, skip_special=True)
    return completion_logprobs(tokens, [None] * len(tokens), NAMES, counter)["text_offset"]


@pytest.mark.parametrize(
    ("tokens", "echo", "right"),
    [
        ([*"aü".encode(), *b"b"], "aüb", [0, 1, 1, 2]),
        ([*"😀".encode(), *b"b"], "😀b", [0, 0, 0, 0, 1]),
        ([BOS, *b"ab"], "ab", [0, 0, 1]),
        ([BOS, *b"ab"], "<s>ab", [0, 3, 4]),
        ([BOS, BOS, *b"ab"], "<s>ab", [0, 0, 3, 4]),
        ([*b"a", EOS, *b"b"], "a<eos>b", [0, 1, 6]),
    ],
    ids=["umlaut", "emoji", "added", "written", "added and written", "in the middle"],
)
def test_places_in_an_echo(tokens: list[int], echo: str, right: list[int]) -> None:
    assert offsets(tokens, echo, tokens) == right


def test_places_after_special_tokens_of_the_output() -> None:
    assert offsets([*b"a", BOS, *b"b"], None, [*b"x"]) == [0, 1, 1]


def test_fields_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        PromptLogprobs(top=1, logprobs=bytes(8), ranks=bytes(8), top_ids=bytes(8), top_logprobs=b"")


def test_an_echo_in_every_choice_is_bounded(live: Live) -> None:
    """256 choices of a prompt that fills a long context were an answer of a gigabyte."""
    with pytest.raises(ApiError, match="16777472 characters") as refused:
        check_echoes(["x" * 2**16, "y"], 256)
    assert refused.value.param == "echo"
    check_echoes(["x" * 2**16], 256)
    asked = {"prompt": "x" * 400, "echo": True, "n": 256, "max_tokens": 1}
    answer = httpx.post(f"{live.url}/v1/completions", json=asked, timeout=DEADLINE).json()
    assert {choice["text"] for choice in answer["choices"]} == {"x" * 401}
