"""Log probabilities in the formats of the two APIs."""

from __future__ import annotations

from typing import Any

from pla_serve.server.generation.detokenize import TokenBytes
from pla_serve.wire.engine import TokenLogprob

LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks."""


class TokenNames:
    """Text and bytes of single tokens. Half a character has the replacement character as text."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes = token_bytes

    def __getitem__(self, token: int) -> tuple[str, list[int]]:
        raw = self._bytes.within(token)
        return raw.decode(errors="replace"), list(raw)


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
    tokens: list[int], logprobs: list[TokenLogprob], names: TokenNames, offset: int
) -> dict[str, Any]:
    """The ``logprobs`` of a completion choice; ``offset`` is where its text begins."""
    texts = [names[token][0] for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [
            # The chosen token is always among them, as OpenAI has it.
            {names[t][0]: _finite(value) for t, value in [(token, entry.logprob), *entry.top]}
            for token, entry in zip(tokens, logprobs, strict=True)
        ],
        "text_offset": offsets,
    }


def _entry(token: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    text, raw = names[token]
    return {"token": text, "logprob": _finite(logprob), "bytes": raw}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
