"""Writes what a reader finds in an answer as output items, and as the events of a stream.

Items come one after another: each is opened, grows and is closed before the next one. An answer
that is not streamed takes the same way; its events are not sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pla_serve.server.api.formats import Json
from pla_serve.server.api.read_format import sound
from pla_serve.server.api.responses.items import ItemStatus, new_item_id, output_text
from pla_serve.server.tools.events import (
    AnswerEvent,
    AnswerText,
    CallBegins,
    Reasoning,
)

OutputEvent = tuple[str, Json]
"""Type and fields of an event, without its number."""


@dataclass(slots=True)
class Growing:
    """The item that is being written.

    Attributes:
        place: its index among the output items.
        item: its fields, without what grows.
        text: what there is of its text, or of its arguments.
    """

    place: int
    item: Json
    text: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """Type of the item."""
        return str(self.item["type"])

    @property
    def where(self) -> Json:
        """Fields that tell which item an event is about."""
        return {"item_id": self.item["id"], "output_index": self.place}

    @property
    def inside(self) -> Json:
        """Fields that tell which part of it an event is about; there is only one."""
        return {**self.where, "content_index": 0}


class OutputWriter:
    """Writes the items of one answer.

    Args:
        namespaces: group and name of functions that the model knows by one name.

    Attributes:
        items: the items that are complete.
    """

    def __init__(self, namespaces: Mapping[str, tuple[str, str]]) -> None:
        self._namespaces = namespaces
        self.items: list[Json] = []
        self._growing: Growing | None = None
        self._blank = ""
        """White space at the beginning of a text; it is no message if nothing else comes."""
        self._logprobs: list[Json] = []
        """Log probabilities of tokens whose text has not come yet."""

    def push(self, found: Iterable[AnswerEvent], logprobs: list[Json]) -> Iterator[OutputEvent]:
        """Take what the next piece of the answer says, and the log probabilities of its tokens."""
        self._logprobs += logprobs
        for event in found:
            if isinstance(event, AnswerText):
                yield from self._take_text(event.text)
            elif isinstance(event, Reasoning):
                if self._kind != "reasoning":
                    yield from self._open_reasoning()
                yield from self._grow(event.text)
            elif isinstance(event, CallBegins):
                yield from self._open_call(event)
            else:
                yield from self._grow(event.text)

    def finish(self, status: ItemStatus) -> Iterator[OutputEvent]:
        """Close the last item with this status, because the answer is over.

        An answer in which nothing was found becomes one message without text.
        """
        if self._growing is None and not self.items:
            blank = self._blank
            yield from self._open_message()
            yield from self._grow(blank)
        yield from self._close(status)

    def abandon(self) -> Iterator[OutputEvent]:
        """Close the item that is being written as incomplete, because nothing more will come."""
        yield from self._close("incomplete")

    @property
    def _kind(self) -> str:
        return self._growing.kind if self._growing else ""

    def _take_text(self, text: str) -> Iterator[OutputEvent]:
        if self._kind != "message":
            text = self._blank + text
            if not text.strip():
                self._blank = text
                return
            yield from self._open_message()
        yield from self._grow(text)

    def _open_message(self) -> Iterator[OutputEvent]:
        logprobs = self._logprobs
        yield from self._open("message", "msg", {"role": "assistant", "content": []})
        yield from self._open_part(output_text("", []))
        self._logprobs = logprobs

    def _open_reasoning(self) -> Iterator[OutputEvent]:
        yield from self._open("reasoning", "rs", {"summary": [], "content": []})
        yield from self._open_part({"type": "reasoning_text", "text": ""})

    def _open_call(self, event: CallBegins) -> Iterator[OutputEvent]:
        fields = {"call_id": new_item_id("call"), "name": sound(event.name), "arguments": ""}
        if event.name in self._namespaces:
            fields["namespace"], fields["name"] = self._namespaces[event.name]
        yield from self._open("function_call", "fc", fields)

    def _open(self, kind: str, prefix: str, fields: Json) -> Iterator[OutputEvent]:
        self._blank, self._logprobs = "", []
        yield from self._close("completed")
        item = {"id": new_item_id(prefix), "type": kind, "status": "in_progress", **fields}
        self._growing = Growing(len(self.items), item)
        place = {"output_index": self._growing.place}
        yield "response.output_item.added", {**place, "item": item}

    def _open_part(self, part: Json) -> Iterator[OutputEvent]:
        assert self._growing is not None
        yield "response.content_part.added", {**self._growing.inside, "part": part}

    def _grow(self, text: str) -> Iterator[OutputEvent]:
        growing, logprobs, self._logprobs = self._growing, self._logprobs, []
        assert growing is not None
        text = sound(text)
        if not text:
            return
        growing.text.append(text)
        if growing.kind == "function_call":
            yield "response.function_call_arguments.delta", {**growing.where, "delta": text}
        elif growing.kind == "reasoning":
            yield "response.reasoning_text.delta", {**growing.inside, "delta": text}
        else:
            growing.logprobs += logprobs
            fields = {**growing.inside, "delta": text, "logprobs": logprobs}
            yield "response.output_text.delta", fields

    def _close(self, status: ItemStatus) -> Iterator[OutputEvent]:
        growing, self._growing = self._growing, None
        if growing is None:
            return
        text = "".join(growing.text)
        item = {**growing.item, "status": status}
        if growing.kind == "function_call":
            item["arguments"] = text
            fields = {**growing.where, "name": item["name"], "arguments": text}
            yield "response.function_call_arguments.done", fields
        elif growing.kind == "reasoning":
            part = {"type": "reasoning_text", "text": text}
            item["content"] = [part]
            yield "response.reasoning_text.done", {**growing.inside, "text": text}
            yield "response.content_part.done", {**growing.inside, "part": part}
        else:
            growing.logprobs += self._logprobs
            part = output_text(text, growing.logprobs)
            item["content"] = [part]
            fields = {**growing.inside, "text": text, "logprobs": growing.logprobs}
            yield "response.output_text.done", fields
            yield "response.content_part.done", {**growing.inside, "part": part}
        self._logprobs = []
        self.items.append(item)
        yield "response.output_item.done", {"output_index": growing.place, "item": item}
