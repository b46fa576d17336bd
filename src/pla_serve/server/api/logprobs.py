"""Log probabilities in the formats of the two APIs."""

from __future__ import annotations

import codecs
from typing import Any

from pla_serve.server.generation.detokenize import TokenBytes
from pla_serve.wire.engine import TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks."""


class TokenNames:
    """Text and bytes of single tokens."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes

    def __getitem__(self, token: int) -> tuple[str, list[int]]:
        """A part of a character has the replacement character as text."""
        raw = self._bytes.within(token)
        return raw.decode(errors="replace"), list(raw)

    def spelled(self, token: int) -> str:
        """A text that tells tokens apart: parts of characters as ``bytes:\\xf0\\x9f``.

        OpenAI's completions endpoint spells them so.
        """
        raw = self._bytes.within(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TextOffsets:
    """Counts the characters of one text, token by token, so that each token has a place in it."""

    def __init__(self, names: TokenNames) -> None:
        self._names = names
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def push(self, token: int) -> int:
        """Where the token begins, in characters; one inside a character begins where that does."""
        place = self._length
        self._length += len(self._decoder.decode(bytes(self._names[token][1])))
        return place


def chat_logprobs(
    tokens: list[int], logprobs: list[TokenLogprob], names: TokenNames
) -> list[dict[str, Any]]:
    """The ``logprobs.content`` of a chat choice."""
    return [
        {
            **_entry(token, entry.logprob, names),
            "top_logprobs": [_entry(other, value, names) for other, value in entry.top],
        }
        for token, entry in zip(tokens, logprobs, strict=True)
    ]


def completion_logprobs(
    tokens: list[int], logprobs: list[TokenLogprob], names: TokenNames, offsets: TextOffsets
) -> dict[str, Any]:
    """The ``logprobs`` of a completion choice; ``offsets`` counts on from the tokens before."""
    return {
        "tokens": [names.spelled(token) for token in tokens],
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [
            _by_text([(token, entry.logprob), *entry.top], names)
            for token, entry in zip(tokens, logprobs, strict=True)
        ],
        "text_offset": [offsets.push(token) for token in tokens],
    }


def _by_text(values: list[tuple[int, float]], names: TokenNames) -> dict[str, float]:
    """The chosen token comes first and is always among them, as OpenAI has it.

    Of tokens with the same text the first one counts, which is the chosen or the likelier one.
    """
    found: dict[str, float] = {}
    for token, value in values:
        found.setdefault(names.spelled(token), _finite(value))
    return found


def _entry(token: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    text, raw = names[token]
    return {"token": text, "logprob": _finite(logprob), "bytes": raw}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
