"""Bodies with too many values are refused before they are built, and others decoded exactly."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.server import bounded_json
from pla_serve.server.bounded_json import MOST_CONTAINERS, MOST_DEPTH, MOST_STRINGS, decode
from pla_serve.server.errors import ApiError

TEXT = st.text(alphabet=st.sampled_from('ab\\"[]{},: \n\té€😀'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
    max_leaves=30,
)


@given(value=VALUES, spaces=st.booleans(), ascii=st.booleans())
def test_what_is_within_bounds_is_decoded_exactly(value: Any, spaces: bool, ascii: bool) -> None:
    text = json.dumps(value, indent=1 if spaces else None, ensure_ascii=ascii).encode()
    assert decode(text) == value


@given(value=st.dictionaries(TEXT, st.lists(st.integers(), max_size=30) | TEXT, max_size=4))
def test_many_numbers_are_decoded_in_pieces_exactly(value: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded_json, "FEW", 0)
        patch.setattr(bounded_json, "MOST_VALUES", 3)
        patch.setattr(bounded_json, "PIECE_BYTES", 5)
        patch.setattr(bounded_json, "MOST_DEPTH", 0)
        patch.setattr(bounded_json, "_check_depth", lambda outside: None)
        text = json.dumps(value).encode()
        try:
            expected: Any = msgspec.json.decode(text)
        except msgspec.DecodeError:
            return  # an integer beyond 64 bits
        assert decode(text) == expected


@given(value=VALUES)
def test_strings_are_cut_out_whatever_they_hold(value: Any) -> None:
    """Exactly the brackets and commas outside of strings remain."""
    text = json.dumps(value).encode()

    def count(item: Any) -> int:
        if isinstance(item, dict):
            return 1 + sum(map(count, item.values()))
        return 1 + sum(map(count, item)) if isinstance(item, list) else 0

    outside = bounded_json._without_strings(text)
    assert outside.count(b"[") + outside.count(b"{") == count(value)
    assert b'"' not in outside


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested(MOST_DEPTH + 1), "nested too deeply"),
        (b"[" * 100_000, "more than 25000 lists and objects"),
        (b'{"a":' * 2000, "nested too deeply"),
        (b"[" + b"[]," * MOST_CONTAINERS + b"[]]", "lists and objects"),
        (b"[" + b'"",' * MOST_STRINGS + b'""]', "strings"),
        (b'{"a": [[' + b"1," * 300_000 + b"1]]}", "not one list of numbers"),
        (b'{"a": [' + b"1," * 300_000 + b'"x"]}', "more than numbers"),
        (b"[" + b"1," * 300_000 + b"1]", "not valid JSON"),
        (b"[" + b"1e308," * 5000 + b"1]", "500 numbers with exponents"),
        (b"[" + b"1E-300," * 5000 + b"1]", "500 numbers with exponents"),
        (b'{"a": 1e400}', "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'"' * 5001, "not valid JSON"),
        (b"\\" * 5001, "not valid JSON"),
    ],
)
def test_what_is_out_of_bounds_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        decode(text)
    assert caught.value.status == 400


def test_the_deepest_value_is_taken() -> None:
    assert decode(nested(MOST_DEPTH)) is not None


def test_a_million_tokens_are_a_prompt() -> None:
    assert decode(b'{"prompt": [' + b"5," * 1_000_000 + b"5]}") == {"prompt": [5] * 1_000_001}


def test_words_are_no_exponents() -> None:
    assert decode(b"[" + b"true,false," * 5000 + b"1e5]")[-1] == 1e5


def test_a_text_full_of_brackets_is_a_text() -> None:
    text = '[{"a\\", ' * 200_000
    assert decode(json.dumps({"prompt": text}).encode()) == {"prompt": text}
