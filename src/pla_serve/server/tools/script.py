"""Readers written as scripts: generators that read as the format does.

A script takes text from its source and emits events. Where it needs text that has not come yet it
yields, and goes on when more is there or the answer is over:

    class Shouted(ScriptReader):
        '''Calls are written CALL name json.'''

        def script(self) -> Script:
            while (yield from self.pass_until(["CALL "], AnswerText)) is not None:
                name, _ = yield from self.take_until([" "])
                index = self.begin(name)
                yield from self.take_json(partial(CallArguments, index))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from pla_serve.server.tools.events import AnswerEvent, AnswerText, CallBegins
from pla_serve.server.tools.scan import JsonEnd, first_marker, safe_length

Result = TypeVar("Result")
ScriptStep = Generator[None, None, Result]
"""A part of a script that gives a result once it has read what it needs."""
Script = ScriptStep[None]


class ScriptReader:
    """A `AnswerReader` whose format is the generator `script`."""

    def __init__(self) -> None:
        self._text = ""
        self._over = False
        self._events: list[AnswerEvent] = []
        self._calls = 0
        self._record: str | None = None
        self._running = self.script()

    def script(self) -> Script:
        """Read one answer; to be written by each format."""
        raise NotImplementedError

    def push(self, text: str) -> list[AnswerEvent]:
        """Take the next piece of text."""
        self._text += text
        return self._go_on()

    def finish(self) -> list[AnswerEvent]:
        """The answer is over: give what was held back."""
        self._over = True
        return self._go_on()

    def _go_on(self) -> list[AnswerEvent]:
        if self._running is not None:
            try:
                next(self._running)
            except StopIteration:
                # A script that has ended leaves the rest to the user.
                self._running = self._rest()
                next(self._running, None)
        events, self._events = self._events, []
        return events

    def _rest(self) -> Script:
        yield from self.pass_until([], AnswerText)

    # For scripts

    def emit(self, event: AnswerEvent) -> None:
        """Tell the user of the reader; an event without text is left out."""
        if getattr(event, "text", None) != "":
            self._events.append(event)

    def begin(self, name: str) -> int:
        """Emit the beginning of a call; its index."""
        index, self._calls = self._calls, self._calls + 1
        self.emit(CallBegins(index, name))
        return index

    def record(self) -> None:
        """Keep what is read from here on, until `recorded` asks for it."""
        self._record = ""

    def recorded(self) -> str:
        """What was read since `record`, as it stood in the text."""
        text, self._record = self._record or "", None
        return text

    def _take(self, length: int) -> str:
        text, self._text = self._text[:length], self._text[length:]
        if self._record is not None:
            self._record += text
        return text

    def pass_until(
        self, markers: Sequence[str], make: Callable[[str], AnswerEvent], *, trim: bool = True
    ) -> ScriptStep[str | None]:
        """Emit text up to the first of ``markers`` and drop that marker.

        White space before a marker goes with it if ``trim``: it belongs to the format and not to
        the text. The marker, or None if the answer ended without one.
        """
        while True:
            found = first_marker(self._text, markers)
            if found is not None:
                place, marker = found
                text = self._take(place)
                self._take(len(marker))
                self.emit(make(text.rstrip() if trim else text))
                return marker
            if self._over:
                self.emit(make(self._take(len(self._text))))
                return None
            safe = safe_length(self._text, markers)
            if trim and markers:
                safe = len(self._text[:safe].rstrip())
            self.emit(make(self._take(safe)))
            yield

    def take_until(self, markers: Sequence[str]) -> ScriptStep[tuple[str, str | None]]:
        """Text up to the first of ``markers``, and that marker; None if the answer ended."""
        while (found := first_marker(self._text, markers)) is None:
            if self._over:
                return self._take(len(self._text)), None
            yield
        place, marker = found
        text = self._take(place)
        self._take(len(marker))
        return text, marker

    def skip_space(self, kinds: str | None = None) -> ScriptStep[None]:
        """Drop white space, also what has not come yet; ``kinds``: only these characters."""
        while True:
            self._take(len(self._text) - len(self._text.lstrip(kinds)))
            if self._text or self._over:
                return
            yield

    def next_is(self, options: Sequence[str]) -> ScriptStep[str | None]:
        """The option that the text goes on with, which stays; None if it is none of them."""
        while True:
            for option in options:
                if self._text.startswith(option):
                    return option
            if self._over or not any(option.startswith(self._text) for option in options):
                return None
            yield

    def drop(self, text: str) -> None:
        """Drop ``text``, with which the source goes on."""
        assert self._text.startswith(text)
        self._take(len(text))

    def take_json(self, make: Callable[[str], AnswerEvent] | None = None) -> ScriptStep[str]:
        """One JSON value as it stands in the text, white space before it dropped.

        Args:
            make: turns the parts of the value into events, which are emitted as they come.

        What there is of the value if the answer ends within it.
        """
        yield from self.skip_space()
        end, value = JsonEnd(), ""
        while True:
            place = end.push(self._text)
            part = self._take(len(self._text) if place is None else place)
            value += part
            if make is not None:
                self.emit(make(part))
            if place is not None or self._over:
                return value
            yield


def json_or_none(text: str) -> Any:
    """The value that ``text`` is JSON of, or None."""
    try:
        return json.loads(text)
    except ValueError:
        return None
