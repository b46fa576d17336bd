"""Hermes, Qwen 2.5, Qwen 3, Granite 4: one JSON object between tags for each call.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

from pla_serve.server.tools.calls import read_call_object
from pla_serve.server.tools.events import AnswerText
from pla_serve.server.tools.script import Script, ScriptReader

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesReader(ScriptReader):
    """Reads calls between ``<tool_call>`` and ``</tool_call>``; other text is content."""

    def script(self) -> Script:
        while (yield from self.pass_until([OPEN], AnswerText)) is not None:
            yield from read_call_object(self)
            yield from self.skip_space()
            if (yield from self.next_is([CLOSE])):
                self.drop(CLOSE)
            yield from self.skip_space()
