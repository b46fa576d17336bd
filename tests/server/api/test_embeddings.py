"""Embeddings, scores and rankings, against an engine that counts letters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from pla_serve.server.embedding_model import EmbeddingModel
from tests.server.fake_core import VOCAB
from tests.server.server_harness import CONTEXT, DEADLINE, MODEL, Live

MEAN = EmbeddingModel("mean", None, (2,))


@pytest.fixture(scope="module")
def counting() -> Any:
    """A server whose vectors are the numbers of a, b, c and d in a text."""
    live = Live(embeddings=MEAN)
    live.wait_ready()
    yield live
    live.close()


def post(live: Live, path: str, body: Any, status: int = 200) -> Any:
    answer = httpx.post(f"{live.url}{path}", json=body, timeout=DEADLINE)
    assert answer.status_code == status, answer.text
    return answer.json()


def rows(answer: Any) -> list[list[float]]:
    return [row.embedding for row in answer.data]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("aaabbbb", [[0.6, 0.8, 0, 0]]),
        (["d", "xyz"], [[0, 0, 0, 1], [0, 0, 0, 0]]),
        ([97, 98, 97, 98], [[0.5**0.5, 0.5**0.5, 0, 0]]),
        ([[97], [98, 98]], [[1, 0, 0, 0], [0, 1, 0, 0]]),
    ],
)
@pytest.mark.parametrize("form", ["float", "base64"])
def test_shapes_of_inputs(counting: Live, given: Any, wanted: Any, form: Any) -> None:
    """The client asks for base64 if nothing is said, and reads it itself."""
    with counting.client() as client:
        extra = {"encoding_format": "float"} if form == "float" else {}
        answer = client.embeddings.create(model=MODEL, input=given, **extra)
    assert [row.index for row in answer.data] == list(range(len(wanted)))
    for found, right in zip(rows(answer), wanted, strict=True):
        assert found == pytest.approx(right)


def test_vectors_are_cut_where_the_model_was_trained_for_it(counting: Live) -> None:
    with counting.client() as client:
        answer = client.embeddings.create(model=MODEL, input="abbcc", dimensions=2)
        assert rows(answer)[0] == pytest.approx([0.2**0.5, 0.8**0.5])
        with pytest.raises(openai.BadRequestError, match=r"trained .* cut to 3; it was to 2"):
            client.embeddings.create(model=MODEL, input="a", dimensions=3)


def test_a_language_model_takes_the_last_token(live: Live, client: openai.OpenAI) -> None:
    assert rows(client.embeddings.create(model=MODEL, input="abc")) == [[0, 0, 1, 0]]
    with pytest.raises(openai.BadRequestError, match="was not trained"):
        client.embeddings.create(model=MODEL, input="a", dimensions=2)


def test_a_model_that_makes_none_says_why(serve: Callable[..., Live]) -> None:
    live = serve(embeddings=EmbeddingModel(refusal="its pooling (max) is not one of mean"))
    error = post(live, "/v1/embeddings", {"input": "a"}, 400)["error"]
    assert "pooling (max)" in error["message"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"input": ""}, "empty"),
        ({"input": []}, "non-empty"),
        ({"input": ["a", ""]}, "empty"),
        ({"input": ["a"] * 257}, "at most 256"),
        ({"input": ["a", 3]}, "neither"),
        ({"input": [[1], []]}, "empty"),
        ({"input": [VOCAB]}, "token ids must lie"),
        ({"input": [-1]}, "token ids must lie"),
        ({"input": "a" * (CONTEXT + 1)}, "token"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "max_tokens": 3}, "max_tokens"),
        ({"input": "a", "priority": 1}, "priorities are not enabled"),
        ({}, "input"),
    ],
)
def test_what_is_refused(counting: Live, body: Any, reason: str) -> None:
    assert reason in str(post(counting, "/v1/embeddings", body, 400)["error"])


def test_most_inputs_of_one_request(counting: Live) -> None:
    with counting.client() as client:
        answer = client.embeddings.create(model=MODEL, input=["a"] * 255 + ["b"])
    assert [row.index(1.0) for row in rows(answer)] == [0] * 255 + [1]
    assert answer.usage.prompt_tokens == 256


def test_a_prompt_that_fills_the_context_is_taken(counting: Live) -> None:
    with counting.client() as client:
        assert rows(client.embeddings.create(model=MODEL, input="a" * CONTEXT))[0][0] == 1.0


@pytest.mark.parametrize(
    ("first", "second", "scores"),
    [
        ("ab", ["a", "ab", "c"], [0.5**0.5, 1, 0]),
        (["a", "b"], ["a", "a"], [1, 0]),
        ("a", "a", [1]),
    ],
)
def test_scores_are_cosines(counting: Live, first: Any, second: Any, scores: Any) -> None:
    answer = post(counting, "/v1/score", {"text_1": first, "text_2": second})
    assert [each["score"] for each in answer["data"]] == pytest.approx(scores)
    assert [each["index"] for each in answer["data"]] == list(range(len(scores)))
    assert answer["model"] == MODEL


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]},
        {"text_1": ["a"] * 200, "text_2": ["a"] * 200},
        {"text_1": "a", "text_2": []},
        {"text_1": "a", "text_2": [1]},
    ],
)
def test_scores_that_are_refused(counting: Live, body: Any) -> None:
    assert "text_" in str(post(counting, "/v1/score", body, 400)["error"])


def test_the_best_documents_come_first(counting: Live) -> None:
    documents = ["c", {"text": "ab"}, "aab", "ab"]
    body = {"query": "ab", "documents": documents}
    results = post(counting, "/v1/rerank", body)["results"]
    assert [each["index"] for each in results] == [1, 3, 2, 0]
    assert results[0]["document"] == {"text": "ab"}
    assert results[0]["relevance_score"] == pytest.approx(1)
    short = post(counting, "/v1/rerank", {**body, "top_n": 1, "return_documents": False})
    assert [set(each) for each in short["results"]] == [{"index", "relevance_score"}]
    assert short["usage"]["total_tokens"] == 10


def test_rankings_that_are_refused(counting: Live) -> None:
    for documents in ([], ["a"] * 256, [3], [{"text": "a", "image": "b"}], ["a", ""]):
        post(counting, "/v1/rerank", {"query": "a", "documents": documents}, 400)
