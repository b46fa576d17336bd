"""Mistral: a marker, then an array of objects, or a name and its arguments for each call.

[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}]
[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}
[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris"}
"""

from __future__ import annotations

from functools import partial

from pla_serve.server.tools.calls import read_call_array
from pla_serve.server.tools.events import AnswerText, CallArguments
from pla_serve.server.tools.script import Script, ScriptReader, ScriptStep

MARKER, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class MistralReader(ScriptReader):
    """Reads all that follows ``[TOOL_CALLS]``; text before it is content."""

    def script(self) -> Script:
        while (yield from self.pass_until([MARKER], AnswerText)) is not None:
            yield from self.skip_space()
            if (yield from self.next_is(["["])):
                yield from read_call_array(self)
            else:
                yield from self._named_call()
            yield from self.skip_space()

    def _named_call(self) -> ScriptStep[None]:
        name, marker = yield from self.take_until([CALL_ID, ARGUMENTS, "{"])
        if marker == CALL_ID:
            _, marker = yield from self.take_until([ARGUMENTS, "{"])
        if marker == "{":
            self._text = "{" + self._text
        index = self.begin(name.strip())
        if marker is None:
            self.emit(CallArguments(index, "{}"))
            return
        yield from self.take_json(partial(CallArguments, index))
