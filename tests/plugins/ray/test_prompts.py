"""Prompts of other people's requests, as the request router sees them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pla_serve.plugins.ray.prompts import MOST_BYTES, prompt_of


def chat(*messages: tuple[str, object], **more: object) -> dict[str, object]:
    return {"messages": [{"role": role, "content": text} for role, text in messages], **more}


def shared(one: object, other: object) -> int:
    """Blocks that two prompts begin with together."""
    first, second = prompt_of(one), prompt_of(other)
    assert first is not None
    assert second is not None
    pairs = zip(first.chain.hashes, second.chain.hashes, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(first.chain.hashes))


def test_the_next_turn_of_a_conversation_begins_with_the_one_before() -> None:
    turn = chat(("system", "be kind " * 40), ("user", "hello " * 40))
    first = prompt_of(turn)
    assert first is not None
    longer = chat(
        ("system", "be kind " * 40),
        ("user", "hello " * 40),
        ("assistant", "good day"),
        ("user", "more"),
    )
    assert shared(turn, longer) == len(first.chain.hashes) > 0
    assert shared(turn, chat(("system", "be rude " * 40))) == 0


def test_a_text_is_about_as_long_in_tokens_as_it_is() -> None:
    found = prompt_of({"prompt": "word " * 400})
    assert found is not None
    assert (found.tokens, len(found.chain.hashes), found.told) == (500, 31, False)


def test_tokens_are_tokens() -> None:
    found = prompt_of({"prompt": list(range(40))})
    assert found is not None
    assert (found.tokens, len(found.chain.hashes)) == (40, 2)


def test_models_of_pydantic_and_parts_of_messages_are_read() -> None:
    part = SimpleNamespace(type="text", text="a" * 640)
    message = SimpleNamespace(role="user", content=[part, {"type": "image_url"}])
    request = SimpleNamespace(messages=[message], prompt=None)
    assert shared(request, chat(("user", "a" * 640))) == 10


def test_salts_keep_prompts_apart() -> None:
    one, other = chat(("user", "a" * 640)), chat(("user", "a" * 640), cache_salt="x")
    assert shared(one, other) == 0


@pytest.mark.parametrize(
    "request_",
    [
        None,
        7,
        {},
        {"messages": []},
        {"messages": None, "prompt": None},
        {"prompt": []},
        {"input": "text"},
    ],
)
def test_other_requests_have_no_prompt(request_: object) -> None:
    assert prompt_of(request_) is None


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": ""},
        {"prompt": "\ud800" * 9},
        {"prompt": [2**80]},
        {"prompt": [[1, 2], None, "x"]},
        {"messages": [None, 3, {"role": 5, "content": {"a": 1}}]},
        {"messages": [{"content": [None, 3, {"text": 4}]}]},
    ],
)
def test_nonsense_has_a_short_prompt(request_: object) -> None:
    found = prompt_of(request_)
    assert found is not None
    assert 1 <= found.tokens < 20


def test_endless_prompts_are_compared_in_part() -> None:
    found = prompt_of({"prompt": "x" * (MOST_BYTES * 3)})
    assert found is not None
    assert found.tokens == MOST_BYTES * 3 // 4
    assert len(found.chain.hashes) == MOST_BYTES // 4 // 16
    tokens = prompt_of({"prompt": [7] * (MOST_BYTES // 4 + 160)})
    assert tokens is not None
    assert tokens.tokens == MOST_BYTES // 4 + 160
    assert len(tokens.chain.hashes) == MOST_BYTES // 4 // 16
