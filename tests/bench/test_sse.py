from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.bench.sse import EventSplitter, decode

STREAM = (
    b": keep-alive\n\n"
    b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\r\n\r\n'
    b"event: message\nid: 7\n"
    b'data:{"choices": [{"delta": {"content": "gr\xc3\xbc\xc3\x9fe\\n\\n"}}]}\n\n'
    b"\n\n"
    b'data: {"choices": [],\ndata: "usage": null}\n\n'
    b"data: [DONE]\n\n"
    b"data: never finished"
)


def feed(portions: list[bytes]) -> list[bytes]:
    splitter = EventSplitter()
    return [payload for portion in portions for payload in splitter.feed(portion)]


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_events_do_not_depend_on_how_the_bytes_are_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    payloads = feed([STREAM[a:b] for a, b in itertools.pairwise(edges)])

    assert payloads[-1] == b"[DONE]"
    role, text, usage = map(decode, payloads[:-1])
    assert role.choices[0].content == ""
    assert text.choices[0].content == "grüße\n\n"
    assert usage.choices == []


def test_byte_by_byte() -> None:
    assert len(feed([bytes([byte]) for byte in STREAM])) == 4


def test_chat_completion_and_reasoning_texts() -> None:
    for choice, content in (
        ({"delta": {"content": "a"}}, "a"),
        ({"delta": {"content": None, "reasoning_content": "b"}}, "b"),
        ({"text": "c"}, "c"),
        ({"delta": {}, "finish_reason": "stop"}, ""),
    ):
        assert decode(msgspec.json.encode({"choices": [choice]})).choices[0].content == content


def test_cached_tokens_are_unknown_unless_reported() -> None:
    plain = decode(b'{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 1}}')
    assert plain.usage is not None
    assert plain.usage.cached_tokens is None
    told = decode(b'{"usage": {"prompt_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}}}')
    assert told.usage is not None
    assert told.usage.cached_tokens == 0


@pytest.mark.parametrize("payload", [b"{", b"[]", b'{"choices": 3}', b"\xff"])
def test_what_is_no_chunk_is_refused(payload: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode(payload)
