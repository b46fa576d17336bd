"""Llama 3: the answer is a call, or several with semicolons between them.

{"name": "get_weather", "parameters": {"city": "Paris"}}
<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}
"""

from __future__ import annotations

from pla_serve.server.tools.calls import read_call_object
from pla_serve.server.tools.events import AnswerText
from pla_serve.server.tools.script import Script, ScriptReader

TAG = "<|python_tag|>"
BEGINNINGS = (TAG, "{")


class LlamaJsonReader(ScriptReader):
    """An answer that begins with a brace or with the tag is calls; any other one is content."""

    def script(self) -> Script:
        yield from self.skip_space()
        beginning = yield from self.next_is(BEGINNINGS)
        if beginning is None:
            if (yield from self.pass_until([TAG], AnswerText)) is None:
                return
        elif beginning == TAG:
            self.drop(TAG)
        while (yield from read_call_object(self)):
            yield from self.skip_space()
            if (yield from self.next_is([";", ","])):
                self.drop(self._text[0])
            yield from self.skip_space()
            if (yield from self.next_is(BEGINNINGS)) == TAG:
                self.drop(TAG)
