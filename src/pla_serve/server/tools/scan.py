"""Finds markers and JSON values in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def safe_length(text: str, markers: Sequence[str]) -> int:
    """How much of ``text`` can be no part of a marker that is still coming.

    >>> safe_length("a<tool", ["<tool_call>"])
    1
    """
    for length in range(min(len(text), max(map(len, markers), default=1) - 1), 0, -1):
        tail = text[-length:]
        if any(len(marker) > length and marker.startswith(tail) for marker in markers):
            return len(text) - length
    return len(text)


def first_marker(text: str, markers: Sequence[str], start: int = 0) -> tuple[int, str] | None:
    """The place and name of the marker that comes first; of two at one place, the longer."""
    found = [(place, -len(m), m) for m in markers if (place := text.find(m, start)) >= 0]
    if not found:
        return None
    place, _, marker = min(found)
    return place, marker


class JsonEnd:
    """Finds where a JSON value ends, character by character.

    Containers and strings end at their last character. A bare literal (number, true, null) ends
    before the first character that cannot belong to it.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._bare = False
        self.started = False

    def push(self, text: str, start: int = 0) -> int | None:
        """The place in ``text`` behind the value, or None if it goes on. Not to be called again
        once it has given a place."""
        for place in range(start, len(text)):
            if self._bare and (text[place] in ",]}" or text[place].isspace()):
                return place
            if self._ends_with(text[place]):
                return place + 1
        return None

    def _ends_with(self, char: str) -> bool:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                return self._depth == 0
            return False
        if not self.started and char.isspace():
            return False
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._depth <= 0
        elif not self.started:
            self._bare = True
        self.started = True
        return False
