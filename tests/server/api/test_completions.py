"""Text completions through the openai client, against the echo engine."""

from __future__ import annotations

import json

import openai
import pytest

from tests.server.fake_core import REJECT_SEED
from tests.server.server_harness import CONTEXT, MODEL, Live, until


def test_answers(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == 3


def test_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="x" * 30)
    assert answer.choices[0].text == "x" * 16
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["ab", "cd"], ["ab", "cd"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
        ("ü", ["ü"]),
    ],
    ids=["texts", "tokens", "lists of tokens", "text"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_shapes_of_prompts(
    client: openai.OpenAI, prompt: object, texts: list[str], stream: bool
) -> None:
    result = client.completions.create(model=MODEL, prompt=prompt, stream=stream)
    if not stream:
        assert [choice.text for choice in result.choices] == texts
        return
    found = [""] * len(texts)
    for chunk in result:
        found[chunk.choices[0].index] += chunk.choices[0].text
    assert found == texts


def test_a_batch_times_n_is_ordered_by_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], n=2)
    assert [choice.text for choice in answer.choices] == ["a", "a", "b", "b"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == 8


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: openai.OpenAI, prompt: object, stream: bool) -> None:
    result = client.completions.create(model=MODEL, prompt=prompt, echo=True, stream=stream)
    text = "".join(c.choices[0].text for c in result) if stream else result.choices[0].text
    assert text == "abab"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    result = client.completions.create(
        model=MODEL, prompt="abcd", max_tokens=3, logprobs=2, stream=stream
    )
    found = [c.choices[0].logprobs for c in result] if stream else [result.choices[0].logprobs]
    assert [token for part in found for token in part.tokens] == ["a", "b", "c"]
    assert [offset for part in found for offset in part.text_offset] == [0, 1, 2]
    assert [value for part in found for value in part.token_logprobs] == [-0.5] * 3
    assert found[0].top_logprobs[0] == {"a": -0.5, "b": -1.5}


def test_stop_ends_one_choice_and_not_the_other(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a.b", "cd"], stop=["."])
    assert [choice.text for choice in answer.choices] == ["a", "cd"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_parts_of_characters(client: openai.OpenAI, stream: bool) -> None:
    """Parts of a character have texts that differ, and begin where the character begins."""
    result = client.completions.create(
        model=MODEL, prompt="a😀b", max_tokens=6, logprobs=3, stream=stream
    )
    found = [c.choices[0].logprobs for c in result] if stream else [result.choices[0].logprobs]
    parts = [rf"bytes:\x{byte:02x}" for byte in "😀".encode()]
    assert [token for part in found for token in part.tokens] == ["a", *parts, "b"]
    assert [place for part in found for place in part.text_offset] == [0, 1, 1, 1, 1, 2]
    tops = [top for part in found for top in part.top_logprobs]
    assert tops[1] == {parts[0]: -0.5, r"bytes:\xf1": -1.5, r"bytes:\xf2": -2.5}


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema"),
        ({"structured_outputs": {"regex": "a+"}}, "regex"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "regex"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark"),
        ({"structured_outputs": {"json_object": True}}, "json_object"),
        ({"guided_json": '{"type": "object"}'}, "json_schema"),
        ({"guided_choice": ["a"]}, "regex"),
    ],
)
def test_constraints_reach_the_engine(
    client: openai.OpenAI, extra: dict[str, object], kind: str
) -> None:
    answer = client.completions.create(model=MODEL, prompt="x", max_tokens=99, extra_body=extra)
    assert json.loads(answer.choices[0].text) == {"grammar": kind}


def test_batch_refused_as_a_whole(live: Live, client: openai.OpenAI) -> None:
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt=["a", "b"], seed=REJECT_SEED)
    until(lambda: live.metric("vllm:num_requests_running") == 0)


def test_a_prompt_of_the_whole_context_leaves_nothing(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt=[1] * CONTEXT, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    answer = client.completions.create(model=MODEL, prompt=[1] * (CONTEXT - 1), max_tokens=1)
    assert answer.usage.total_tokens == CONTEXT


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == [MODEL, "alias"]
    assert models[0].model_extra["max_model_len"] == CONTEXT
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"
