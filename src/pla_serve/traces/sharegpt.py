"""Reads ShareGPT's JSON: chats as texts, of which only the lengths are used."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import IO, Any

from pla_serve.traces.rows import Row, TraceError

CountTokens = Callable[[str], int]
_ANSWERS = frozenset({"gpt", "chatgpt", "assistant", "model", "bard", "bing"})


def about_four_characters(text: str) -> int:
    """Estimate the tokens of a text: four characters a token.

    English text has about that many with vocabularies of 50K to 150K tokens. Chinese text and code
    have fewer characters a token.
    """
    return -(-len(text) // 4)


def sharegpt(file: IO[str], count_tokens: CountTokens) -> Iterator[Row]:
    """Yield a row for each answer of each chat.

    The file holds ``[{"id": ..., "conversations": [{"from": "human", "value": "..."}, ...]}, ...]``
    or one such object a line. The prompt of an answer is all that was said before it, and its
    history (``cached_tokens``) is the previous prompt and answer. Chat templates are not counted,
    and there are no times. Messages after the last answer give no row.

    Raises:
        TraceError: the JSON is malformed, or a conversation has another form.
    """
    index = 0
    for place, entry in enumerate(_entries(file)):
        name = f"{place}"
        try:
            lengths = _lengths(entry, count_tokens)
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"conversation {place}: not ShareGPT's form ({error!r})") from None
        for turn, (prompt, history, answer) in enumerate(lengths, 1):
            yield Row(index, None, prompt, answer, name, history, turn=turn)
            index += 1


def _entries(file: IO[str]) -> Iterator[Any]:
    try:
        text = file.read()
        if text.lstrip().startswith("["):
            yield from json.loads(text)
            return
        for line in text.splitlines():
            if line.strip():
                yield json.loads(line)
    except ValueError as error:
        raise TraceError(f"malformed JSON: {error}") from None


def _lengths(entry: Any, count_tokens: CountTokens) -> list[tuple[int, int, int]]:
    """Return the tokens of prompt, history and answer, for each answer of a chat."""
    said = history = 0
    requests = []
    for message in entry["conversations"]:
        tokens = count_tokens(str(message["value"]))
        if str(message["from"]).lower() in _ANSWERS and said > history:
            answer = max(1, tokens)
            requests.append((said, history, answer))
            said += answer
            history = said
        else:
            said += tokens
    return requests
