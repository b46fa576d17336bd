"""Decodes JSON of clients without holding the interpreter lock for long.

A decoder builds all values in one go, and no other thread runs meanwhile. So values are counted
first, in passes that take a millisecond or two for a megabyte, and what has too many is refused.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from pla_serve.server.errors import invalid

MOST_DEPTH = 100
"""Lists and objects inside one another."""
MOST_STRINGS = 50_000
"""Strings in one body, names of fields included."""
MOST_CONTAINERS = 25_000
"""Lists and objects in one body."""
MOST_VALUES = 250_000
"""Values in one body, but for one list of numbers in a field of its own."""
MOST_EXPONENTS = 500
"""Numbers with an exponent, as 1e300, in one body: some take a thousand times as long as others."""
FEW = 4096
"""Bytes below which nothing but the depth can be out of bounds."""
PIECE_BYTES = 256 * 2**10
"""A list of numbers is decoded in pieces of this size."""

_BRACKETS = re.compile(rb"[][{}]")


def decode(text: bytes, what: str = "the body") -> Any:
    """Decode JSON text, and refuse text that would take long to decode.

    It is decoded by msgspec, which refuses NaN, Infinity, numbers out of range and bad UTF-8. The
    standard library accepts these.

    Args:
        what: name of the text in error messages.

    Raises:
        ApiError: 400, the text is not JSON, or has too many or too deeply nested values.
    """
    try:
        many = _check(text)
        return _decode_fields(text) if many else msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"{what} is not valid JSON: {error}") from None
    except ValueError as error:
        raise invalid(f"{what} {error}") from None
    except RecursionError:
        raise invalid(f"{what} is nested too deeply") from None


def _check(text: bytes) -> bool:
    """Count the values of ``text``; True if there are more than `MOST_VALUES`.

    Raises:
        ValueError: there are more than any body may have.
    """
    opened = text.count(b"[") + text.count(b"{")
    if opened <= MOST_DEPTH and len(text) <= FEW:
        return False
    outside = _without_strings(text)
    opened = outside.count(b"[") + outside.count(b"{")
    if opened > MOST_CONTAINERS:
        raise ValueError(f"has more than {MOST_CONTAINERS} lists and objects")
    words = outside.count(b"true") + outside.count(b"false")
    if outside.count(b"e") + outside.count(b"E") - words > MOST_EXPONENTS:
        raise ValueError(f"has more than {MOST_EXPONENTS} numbers with exponents")
    if opened > MOST_DEPTH:
        _check_depth(outside)
    return outside.count(b",") >= MOST_VALUES


def _without_strings(text: bytes) -> bytes:
    """``text`` with all strings cut out."""
    # Backslashes are found in strings only, so pairs of them can be taken from the left.
    if b"\\" in text:
        text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    if text.count(b'"') > 2 * MOST_STRINGS:
        raise ValueError(f"has more than {MOST_STRINGS} strings")
    return b"".join(text.split(b'"')[::2])


def _check_depth(outside: bytes) -> None:
    depth = 0
    for bracket in _BRACKETS.finditer(outside):
        depth += 1 if bracket[0] in (b"[", b"{") else -1
        if depth > MOST_DEPTH:
            raise ValueError(f"is nested too deeply, more than {MOST_DEPTH} lists and objects")


def _decode_fields(text: bytes) -> dict[str, Any]:
    """An object with many values, of which all but few are numbers in lists that are fields."""
    fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    return {name: _decode_field(bytes(raw)) for name, raw in fields.items()}


def _decode_field(text: bytes) -> Any:
    if text.count(b",") < MOST_VALUES:
        return msgspec.json.decode(text)
    outside = _without_strings(text)
    if outside.count(b",") < MOST_VALUES:
        return msgspec.json.decode(text)
    if not (text[:1] == b"[" and outside.count(b"[") == 1 and b"{" not in outside):
        raise ValueError(f"has more than {MOST_VALUES} values that are not one list of numbers")
    if len(outside) < len(text):
        raise ValueError("has a long list with more than numbers")
    return _decode_numbers(text)


def _decode_numbers(text: bytes) -> list[Any]:
    numbers: list[Any] = []
    begin, end = 1, len(text) - 1
    while begin < end:
        cut = end if end - begin <= PIECE_BYTES else text.find(b",", begin + PIECE_BYTES)
        cut = end if cut < 0 else cut
        numbers += msgspec.json.decode(b"[" + text[begin:cut] + b"]")
        begin = cut + 1
    return numbers
