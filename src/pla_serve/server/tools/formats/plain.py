"""Models whose template shows no tools: the tools and the format are told in a system message.

{"name": "get_weather", "arguments": {"city": "Paris"}}
"""

from __future__ import annotations

import json

from pla_serve.server.tools.calls import read_call_object
from pla_serve.server.tools.script import Script, ScriptReader
from pla_serve.server.tools.tool import Tools

INSTRUCTIONS = """You can call these functions. Each is described by a JSON schema:
{tools}
To call functions, answer with nothing but one JSON object for each call, a line each:
{{"name": <function name>, "arguments": <object that fits the schema>}}
Otherwise answer in plain text."""


class PlainJsonReader(ScriptReader):
    """An answer that begins with a brace is calls; any other one is content."""

    def script(self) -> Script:
        while True:
            yield from self.skip_space()
            if (yield from self.next_is(["{"])) is None:
                return
            yield from read_call_object(self)


def instructions(tools: Tools) -> str:
    """System message that tells a model of the tools and of how to call them."""
    lines = [
        json.dumps(
            {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
            ensure_ascii=False,
        )
        for tool in tools.values()
    ]
    return INSTRUCTIONS.format(tools="\n".join(lines))
