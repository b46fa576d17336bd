"""Granite 3: a marker, then an array of calls.

    <|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]

Granite 3.1 and later write the marker as ``<tool_call>``, Granite 4 writes calls as Hermes does.
"""

from __future__ import annotations

from pla_serve.server.tools.calls import read_call_array
from pla_serve.server.tools.events import AnswerText
from pla_serve.server.tools.script import Script, ScriptReader

MARKERS = ("<|tool_call|>", "<tool_call>")


class GraniteReader(ScriptReader):
    """Reads the array behind the marker; text around it is content."""

    def script(self) -> Script:
        while (yield from self.pass_until(MARKERS, AnswerText)) is not None:
            yield from read_call_array(self)
            yield from self.skip_space()
