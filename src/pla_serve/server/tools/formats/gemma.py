"""FunctionGemma and Gemma 4: a compact object with quotes of its own.

<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>
<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pla_serve.server.tools.events import AnswerText, CallArguments
from pla_serve.server.tools.script import Script, ScriptReader


@dataclass(frozen=True, slots=True)
class GemmaTags:
    """How one generation of Gemma writes the three marks of a call."""

    open: str
    close: str
    quote: str


FUNCTION_GEMMA = GemmaTags("<start_function_call>", "<end_function_call>", "<escape>")
GEMMA_4 = GemmaTags("<|tool_call>", "<tool_call|>", '<|"|>')


class GemmaReader(ScriptReader):
    """Reads calls between the tags; a call is emitted when its closing tag is there."""

    def __init__(self, tags: GemmaTags) -> None:
        self._tags = tags
        super().__init__()

    def script(self) -> Script:
        while (yield from self.pass_until([self._tags.open], AnswerText)) is not None:
            text, _ = yield from self.take_until([self._tags.close])
            head, brace, body = text.strip().partition("{")
            index = self.begin(head.removeprefix("call").lstrip(":").strip())
            arguments = read_compact(brace + body, self._tags.quote) if brace else {}
            self.emit(CallArguments(index, json.dumps(arguments, ensure_ascii=False)))
            yield from self.skip_space()


def read_compact(text: str, quote: str) -> dict[str, Any]:
    """The object that ``{key:value,…}`` writes; strings stand between two ``quote``.

    A text that is cut short gives what it has until there.
    """
    value, _ = _CompactText(text, quote).value(0)
    return value if isinstance(value, dict) else {}


@dataclass(frozen=True, slots=True)
class _CompactText:
    text: str
    quote: str

    def value(self, place: int) -> tuple[Any, int]:
        """The value at ``place``, and the place behind it."""
        place = self._skip(place)
        if self.text.startswith(self.quote, place):
            return self._string(place)
        if self.text.startswith("{", place):
            return self._object(place + 1)
        if self.text.startswith("[", place):
            return self._array(place + 1)
        end = place
        while end < len(self.text) and self.text[end] not in ",]}":
            end += 1
        word = self.text[place:end].strip()
        try:
            return json.loads(word), end
        except ValueError:
            return word, end

    def _skip(self, place: int) -> int:
        while place < len(self.text) and self.text[place] in " \n\t,":
            place += 1
        return place

    def _string(self, place: int) -> tuple[str, int]:
        start = place + len(self.quote)
        end = self.text.find(self.quote, start)
        if end < 0:
            return self.text[start:], len(self.text)
        return self.text[start:end], end + len(self.quote)

    def _object(self, place: int) -> tuple[dict[str, Any], int]:
        found: dict[str, Any] = {}
        while True:
            place = self._skip(place)
            if place >= len(self.text) or self.text[place] == "}":
                return found, place + 1
            if self.text.startswith(self.quote, place):
                key, place = self._string(place)
                place = self.text.find(":", place)
            else:
                colon = self.text.find(":", place)
                key, place = self.text[place:colon].strip(), colon
            if place < 0:
                return found, len(self.text)
            found[key], place = self.value(place + 1)

    def _array(self, place: int) -> tuple[list[Any], int]:
        found: list[Any] = []
        while True:
            place = self._skip(place)
            if place >= len(self.text) or self.text[place] == "]":
                return found, place + 1
            value, place = self.value(place)
            found.append(value)
