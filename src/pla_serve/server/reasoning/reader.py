"""Reads the reasoning out of an answer, and leaves the rest to another reader."""

from __future__ import annotations

from pla_serve.server.reasoning.formats import Beginning, ReasoningFormat
from pla_serve.server.tools.events import (
    AnswerEvent,
    AnswerReader,
    AnswerText,
    CallBegins,
    Reasoning,
)
from pla_serve.server.tools.scan import first_marker, safe_length
from pla_serve.server.tools.script import Script, ScriptReader, ScriptStep

LINES = "\r\n"


class TextReader:
    """An `AnswerReader` to which all is text."""

    def push(self, text: str) -> list[AnswerEvent]:
        return [AnswerText(text)] if text else []

    def finish(self) -> list[AnswerEvent]:
        return []


class ReasoningReader(ScriptReader):
    """Reads one answer whose reasoning stands between markers.

    White space next to the markers belongs to the format. An answer that is cut within its
    reasoning has no text.

    Args:
        form: the markers.
        beginning: how the answer begins.
        inner: reads what is no reasoning.
        calls: markers of calls that end the reasoning; those of ``form``, or none.
    """

    def __init__(
        self,
        form: ReasoningFormat,
        beginning: Beginning,
        inner: AnswerReader | None = None,
        calls: tuple[str, ...] = (),
    ) -> None:
        self._form = form
        self._beginning = beginning
        self._inner = inner or TextReader()
        self._inner_calls = calls
        self._called = False
        super().__init__()

    def script(self) -> Script:
        reasons = self._beginning is Beginning.REASONING
        if self._beginning is Beginning.EITHER:
            reasons = yield from self._opens()
        while reasons:
            yield from self._reasoning()
            reasons = self._form.repeats and (yield from self._answer_until(self._form.opens))
        yield from self._answer_until(())

    def finish(self) -> list[AnswerEvent]:
        return [*super().finish(), *self._inner.finish()]

    def _opens(self) -> ScriptStep[bool]:
        """Whether the answer begins with reasoning; drops the marker if it does."""
        self.record()
        yield from self.skip_space()
        blank = self.recorded()
        marker = yield from self.next_is(self._form.opens)
        if marker is not None:
            self.drop(marker)
            return True
        self._pass_on(blank)
        if self._form.repeats:
            return (yield from self._answer_until(self._form.opens))
        return False

    def _reasoning(self) -> ScriptStep[None]:
        yield from self.skip_space()
        opened_twice = yield from self.next_is(self._form.opens)
        if opened_twice is not None:
            self.drop(opened_twice)
            yield from self.skip_space()
        marker = yield from self.pass_until([*self._form.closes, *self._inner_calls], Reasoning)
        if marker in self._inner_calls:
            self._text = marker + self._text
        yield from self.skip_space(LINES)

    def _answer_until(self, markers: tuple[str, ...]) -> ScriptStep[bool]:
        """Give text to the inner reader up to one of ``markers``; False if none came."""
        while True:
            wanted = () if self._called else markers
            found = first_marker(self._text, wanted)
            if found is not None:
                self._pass_on(self._take(found[0]))
                if not self._called:
                    self._take(len(found[1]))
                    return True
            whole = self._over or not wanted
            self._pass_on(self._take(len(self._text) if whole else safe_length(self._text, wanted)))
            if self._over:
                return False
            yield

    def _pass_on(self, text: str) -> None:
        for event in self._inner.push(text):
            self._called = self._called or isinstance(event, CallBegins)
            self.emit(event)
