"""Qwen 3 Coder: calls as tags, arguments without quotes.

<tool_call>
<function=get_weather>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>
"""

from __future__ import annotations

import json
from typing import Any

from pla_serve.server.tools.events import AnswerText, CallArguments
from pla_serve.server.tools.script import Script, ScriptReader, ScriptStep, json_or_none
from pla_serve.server.tools.tool import Tool, Tools, takes_text

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"


class QwenCoderReader(ScriptReader):
    """Reads ``<function=…>`` blocks, with or without ``<tool_call>`` around them."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        super().__init__()

    def script(self) -> Script:
        while True:
            marker = yield from self.pass_until([OPEN, FUNCTION], AnswerText)
            if marker is None:
                return
            if marker == OPEN:
                yield from self.skip_space()
                if (yield from self.next_is([FUNCTION])) is None:
                    continue
                self.drop(FUNCTION)
            yield from self._function()
            yield from self.skip_space()
            if (yield from self.next_is([CLOSE])):
                self.drop(CLOSE)
            yield from self.skip_space()

    def _function(self) -> ScriptStep[None]:
        name, _ = yield from self.take_until([">"])
        name = name.strip()
        index = self.begin(name)
        self.emit(CallArguments(index, "{"))
        tool, first = self._tools.get(name, Tool(name)), True
        while True:
            _, marker = yield from self.take_until([PARAMETER, END_FUNCTION])
            if marker != PARAMETER:
                break
            key, _ = yield from self.take_until([">"])
            text, _ = yield from self.take_until([END_PARAMETER])
            value = typed_value(unframed(text), tool, key.strip())
            separator = "" if first else ", "
            pair = f"{json.dumps(key.strip(), ensure_ascii=False)}: {value}"
            self.emit(CallArguments(index, separator + pair))
            first = False
        self.emit(CallArguments(index, "}"))


def unframed(text: str) -> str:
    """Without the line breaks that the format puts around a value."""
    return text.removeprefix("\n").removesuffix("\n")


def typed_value(text: str, tool: Tool, key: str) -> str:
    """JSON of a value that is written without quotes, by the type that the schema wants.

    A value that is no JSON, or whose schema wants text, is a string. Python's True, False and None
    count as JSON's.
    """
    if takes_text(tool.property_schema(key)):
        return json.dumps(text, ensure_ascii=False)
    words: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}
    if text.strip().lower() in words:
        return json.dumps(words[text.strip().lower()])
    value = json_or_none(text)
    return json.dumps(text if value is None else value, ensure_ascii=False)
