"""gpt-oss (harmony): messages on channels, calls to recipients.

    <|channel|>analysis<|message|>The user wants …<|end|>
    <|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json
        <|message|>{"city": "Paris"}<|call|>
    <|start|>assistant<|channel|>final<|message|>It is sunny.<|return|>

The format is read from text, since the library of its authors fetches its vocabulary from a host of
its own at run time; the tokens of a model's own folder are the same ones.
"""

from __future__ import annotations

import re
from functools import partial

from pla_serve.server.tools.events import AnswerText, CallArguments, Reasoning
from pla_serve.server.tools.script import Script, ScriptReader, ScriptStep

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = (START, CHANNEL, MESSAGE, "<|constrain|>", *ENDS)
RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.-]+)")


class HarmonyReader(ScriptReader):
    """Analysis is reasoning; commentary to a function is a call; all other messages are content.

    Args:
        calls: False to take calls for content.
    """

    def __init__(self, *, calls: bool = True) -> None:
        self._reads_calls = calls
        super().__init__()

    def script(self) -> Script:
        while not self._over or self._text:
            head, marker = yield from self.take_until([MESSAGE])
            if marker is None:
                if head.strip() and CHANNEL not in head and START not in head:
                    self.emit(AnswerText(head))
                return
            yield from self._message(head)

    def _message(self, head: str) -> ScriptStep[None]:
        _, _, channel = head.rpartition(CHANNEL)
        recipient = RECIPIENT.search(head) if self._reads_calls else None
        if recipient is not None:
            index = self.begin(recipient[1])
            yield from self.pass_until([*ENDS, START], partial(CallArguments, index))
        elif channel.strip().startswith("analysis"):
            yield from self.pass_until([*ENDS, START], Reasoning)
        else:
            yield from self.pass_until([*ENDS, START], AnswerText)
