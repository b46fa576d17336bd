"""Log probabilities in the formats of the two APIs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pla_serve.server.generation.detokenize import Detokenizer, TokenBytes
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

    def offsets(self, prompt: Sequence[int], echo: str | None, skip_special: bool) -> TextOffsets:
        """Return the counter of a text that continues ``prompt``, or begins with its ``echo``.

        Special tokens that the tokenizer has put before a text are not in its echo.

        Args:
            echo: text of the prompt. None if the prompt is not part of the text; then the first
                token to count is that of the output.
            skip_special: whether the output leaves special tokens out.
        """
        if echo is None:
            text = Detokenizer(self._bytes, skip_special_tokens=skip_special, prompt=prompt)
            return TextOffsets(text)
        special = Counter(filter(self._bytes.is_special, prompt))
        added = {
            token: max(0, count - echo.count(self[token][0])) for token, count in special.items()
        }
        kept = frozenset(special)
        text = Detokenizer(self._bytes, skip_special_tokens=skip_special, keep=kept)
        return TextOffsets(text, unseen=added)


class TextOffsets:
    """Counts the characters of one text, token by token, so that each token has a place in it.

    Args:
        text: makes text of the tokens.
        length: characters before the first token.
        unseen: how many of the first occurrences of some tokens are not in the text.
    """

    def __init__(
        self, text: Detokenizer, length: int = 0, unseen: Mapping[int, int] | None = None
    ) -> None:
        self._text = text
        self._length = length
        self._unseen = dict(unseen or {})

    def push(self, token: int) -> int:
        """Count a token, and return the place in the text, in characters, at which it begins.

        A token that begins inside a character begins where the character does.
        """
        place = self._length
        if self._unseen.get(token):
            self._unseen[token] -= 1
        else:
            self._length += len(self._text.push([token]).text)
        return place


def chat_logprobs(
    tokens: list[int], logprobs: list[TokenLogprob], names: TokenNames
) -> list[dict[str, Any]]:
    """Return the ``logprobs.content`` of a chat choice."""
    return [
        {
            **_entry(token, entry.logprob, names),
            "top_logprobs": [_entry(other, value, names) for other, value in entry.top],
        }
        for token, entry in zip(tokens, logprobs, strict=True)
    ]


def completion_logprobs(
    tokens: list[int],
    logprobs: list[TokenLogprob | None],
    names: TokenNames,
    offsets: TextOffsets,
) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion choice, or of the part that a chunk has of it.

    Args:
        logprobs: one for each token. None for the first token of an echoed prompt, which has none.
        offsets: counter of the choice's text, which has counted the tokens before these.
    """
    return {
        "tokens": [names.spelled(token) for token in tokens],
        "token_logprobs": [entry and _finite(entry.logprob) for entry in logprobs],
        "top_logprobs": [
            entry and _by_text([(token, entry.logprob), *entry.top], names)
            for token, entry in zip(tokens, logprobs, strict=True)
        ],
        "text_offset": [offsets.push(token) for token in tokens],
    }


def prompt_logprobs(
    prompt: Sequence[int], entries: Iterable[TokenLogprob], names: TokenNames
) -> list[dict[str, Any] | None]:
    """Return vLLM's ``prompt_logprobs``: for each token the log probabilities by token id.

    The first token has none. Each entry has the token itself first, then the likeliest ones.
    """
    found: list[dict[str, Any] | None] = [None]
    for token, entry in zip(prompt[1:], entries, strict=True):
        ranked = [(token, entry.logprob, entry.rank)]
        ranked += [(other, value, rank) for rank, (other, value) in enumerate(entry.top, 1)]
        values: dict[str, Any] = {}
        for id, value, rank in ranked:
            shown = {"logprob": _finite(value), "rank": rank, "decoded_token": names[id][0]}
            values.setdefault(str(id), shown)
        found.append(values)
    return found


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
