"""DeepSeek V3, R1 and V3.1.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
    ```json
    {"city": "Paris"}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

V3.1 writes ``get_weather<｜tool▁sep｜>{"city": "Paris"}`` between the tags of a call.
"""

from __future__ import annotations

from functools import partial

from pla_serve.server.tools.events import AnswerText, CallArguments
from pla_serve.server.tools.script import Script, ScriptReader, ScriptStep

ALL_BEGIN, ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
MARKERS = (ALL_BEGIN, ALL_END, BEGIN, SEPARATOR, END)


class DeepSeekReader(ScriptReader):
    """Reads calls of both versions; text around them is content."""

    def script(self) -> Script:
        while True:
            marker = yield from self.pass_until([ALL_BEGIN, ALL_END, BEGIN], AnswerText)
            if marker is None:
                return
            if marker == BEGIN:
                yield from self._call()
            yield from self.skip_space()

    def _call(self) -> ScriptStep[None]:
        head, marker = yield from self.take_until([SEPARATOR, END])
        name = head.strip()
        if marker == SEPARATOR and name == "function":
            name, _ = yield from self.take_until(["\n"])
            name = name.strip()
            _, _ = yield from self.take_until(["```json\n", "```json"])
        index = self.begin(name)
        if marker == SEPARATOR:
            yield from self.take_json(partial(CallArguments, index))
            yield from self.take_until([END])
        else:
            self.emit(CallArguments(index, "{}"))
