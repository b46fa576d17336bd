"""What a reader finds in an answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class AnswerText:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of the function ``name``; ``index`` counts the calls of an answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of a call's arguments; the parts of a call together are a JSON object."""

    index: int
    text: str


AnswerEvent = AnswerText | Reasoning | CallBegins | CallArguments


class AnswerReader(Protocol):
    """Reads one answer. Use one object for each answer."""

    def push(self, text: str) -> list[AnswerEvent]:
        """Take the next piece of text. What may be the start of a marker waits for its end."""
        ...

    def finish(self) -> list[AnswerEvent]:
        """The answer is over: give what was held back."""
        ...


@dataclass(slots=True)
class ReadCall:
    """A whole call."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class ReadAnswer:
    """A whole answer, as its reader found it."""

    content: str = ""
    reasoning: str = ""
    calls: list[ReadCall] = field(default_factory=list)

    def add(self, events: Iterable[AnswerEvent]) -> None:
        """Append what ``events`` say."""
        for event in events:
            if isinstance(event, AnswerText):
                self.content += event.text
            elif isinstance(event, Reasoning):
                self.reasoning += event.text
            elif isinstance(event, CallBegins):
                self.calls.append(ReadCall(event.name))
            else:
                self.calls[event.index].arguments += event.text


def read_whole(reader: AnswerReader, text: str) -> ReadAnswer:
    """Read an answer that is complete."""
    answer = ReadAnswer()
    answer.add(reader.push(text))
    answer.add(reader.finish())
    return answer
