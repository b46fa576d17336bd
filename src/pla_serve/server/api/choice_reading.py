"""Reads the choices of an answer: reasoning, text and calls, and how many tokens reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pla_serve.server.reasoning.counter import ReasoningCounter
from pla_serve.server.tools.events import (
    AnswerEvent,
    AnswerReader,
    CallArguments,
    CallBegins,
    Reasoning,
)


@dataclass(frozen=True, slots=True)
class Reading:
    """Says how the choices of one answer are read.

    Attributes:
        make_reader: returns a fresh reader, for one choice.
        make_counter: returns a fresh counter of reasoning tokens; None: the model has no reasoning.
        parallel: False to leave out all calls of a choice but the first.
        shows_reasoning: False to leave out the reasoning.
    """

    make_reader: Callable[[], AnswerReader]
    make_counter: Callable[[], ReasoningCounter] | None = None
    parallel: bool = True
    shows_reasoning: bool = True


class ChoiceReading:
    """Reads one choice, whole or in parts.

    Attributes:
        calls: how many calls have begun.
    """

    def __init__(self, reading: Reading) -> None:
        self.calls = 0
        self._reading = reading
        self._reader = reading.make_reader()
        self._counter = reading.make_counter() if reading.make_counter else None

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of reasoning so far."""
        return 0 if self._counter is None else self._counter.count

    def push(self, text: str, tokens: Sequence[int], *, last: bool) -> list[AnswerEvent]:
        """Return what the next part of the choice says; ``last``: no other part follows."""
        if self._counter is not None:
            self._counter.push(tokens)
        events = self._reader.push(text)
        if last:
            events += self._reader.finish()
        self.calls += sum(isinstance(event, CallBegins) for event in events)
        return [event for event in events if self._is_wanted(event)]

    def _is_wanted(self, event: AnswerEvent) -> bool:
        if isinstance(event, Reasoning):
            return self._reading.shows_reasoning
        if isinstance(event, CallBegins | CallArguments):
            return self._reading.parallel or event.index == 0
        return True
