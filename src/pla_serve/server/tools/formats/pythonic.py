"""Llama 3.2 and Llama 4: calls in a list, in the syntax of Python.

[get_weather(city="Paris"), get_time(zone="Europe/Paris")]
"""

from __future__ import annotations

import ast
import json
from typing import Any

from pla_serve.server.tools.events import CallArguments
from pla_serve.server.tools.script import Script, ScriptReader, ScriptStep

START, END = "<|python_start|>", "<|python_end|>"
MOST_NAME = 256
"""Characters of a function's name; what is longer is no call."""


class PythonicReader(ScriptReader):
    """An answer that begins with a bracket and a name is calls; any other one is content.

    A call is read when its closing parenthesis is there, so its arguments come in one piece.
    """

    def script(self) -> Script:
        yield from self.skip_space()
        if (yield from self.next_is([START])):
            self.drop(START)
            yield from self.skip_space()
        if (yield from self.next_is(["["])) is None:
            return
        self.drop("[")
        read = "["
        while (yield from self._call()):
            read = ""
            yield from self.skip_space()
            if (yield from self.next_is([","])):
                self.drop(",")
        if read:
            self._text = read + self._text
            return
        yield from self.take_until(["]"])
        yield from self.skip_space()
        if (yield from self.next_is([END])):
            self.drop(END)

    def _call(self) -> ScriptStep[bool]:
        """Read one call and emit it; False, with nothing read, if the text is none."""
        yield from self.skip_space()
        length, finder = 0, CallEnd()
        while True:
            end = finder.find(self._text)
            if end is not None:
                break
            if self._over or not _may_be_call(self._text):
                return False
            length = len(self._text)
            while len(self._text) == length and not self._over:
                yield
        text = self._text[:end]
        call = parse_call(text)
        if call is None:
            return False
        self._text = self._text[end:]
        index = self.begin(call[0])
        self.emit(CallArguments(index, json.dumps(call[1], ensure_ascii=False)))
        return True


def _may_be_call(text: str) -> bool:
    name = text[: MOST_NAME + 1].partition("(")[0].strip()
    if len(name) > MOST_NAME:
        return False
    return not name or all(part.isidentifier() for part in name.rstrip(".").split("."))


class CallEnd:
    """Finds the parenthesis that closes the first one, in a text that grows."""

    def __init__(self) -> None:
        self._place = 0
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def find(self, text: str) -> int | None:
        """Return the place behind it, or None if it has not come.

        Args:
            text: all of the text so far; what was looked at before is passed over.
        """
        for place in range(self._place, len(text)):
            if self._closes(text[place]):
                return place + 1
        self._place = len(text)
        return None

    def _closes(self, char: str) -> bool:
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == self._quote:
                self._quote = ""
        elif char in "'\"":
            self._quote = char
        elif char in "([{":
            self._depth += 1
        elif char in ")]}":
            self._depth -= 1
            return self._depth == 0
        return False


def parse_call(text: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of ``name(key=value, …)`` whose values are literals; None for others."""
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            return None
        arguments = {str(word.arg): _literal(word.value) for word in node.keywords if word.arg}
        return ast.unparse(node.func), arguments
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) for key in node.keys if key is not None]
        return dict(zip(map(str, keys), map(_literal, node.values), strict=True))
    return ast.literal_eval(node)
