"""Items of a conversation, as clients of the Responses API send them.

An item is a message, the model's reasoning, a call that the model made, or the result of a call.
Clients send items of earlier answers back as they got them, so fields of an output item that say
nothing to the model are accepted and not used.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from pla_serve.server.api.formats import Json
from pla_serve.server.api.messages import MAX_MESSAGES
from pla_serve.server.api.strict import Strict, refuse

ItemStatus = Literal["in_progress", "completed", "incomplete"]

TEXT_PARTS = {
    "input_text": "text",
    "output_text": "text",
    "text": "text",
    "reasoning_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
}
"""Types of parts that are texts, with the field that has the text."""


def read_texts(value: object) -> list[str]:
    """Return the texts of a content: a string, or parts of a type that is text.

    A union of parts would report, for every part, each member that it does not fit.
    """
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("content must be a string or a list of parts")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"at most {MAX_MESSAGES} parts of content, not {len(value)}")
    return [_read_part(part) for part in value]


def _read_part(part: object) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("a content part must be an object with a type")
    kind = part["type"]
    name = TEXT_PARTS.get(kind)
    if name is None:
        raise refuse("input", f"content parts of type {kind[:50]} are not supported, only text")
    if not isinstance(part.get(name), str):
        raise ValueError(f"a content part of type {kind} must have a string {name}")
    return str(part[name])


_PART = {
    "type": "object",
    "properties": {"type": {"enum": list(TEXT_PARTS)}, "text": {"type": "string"}},
    "required": ["type"],
}
Texts = Annotated[
    list[str],
    PlainValidator(read_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}),
]
OptionalTexts = Annotated[
    list[str],
    PlainValidator(read_texts),
    WithJsonSchema({"anyOf": [{"type": "null"}, {"type": "array", "items": _PART}]}),
]


class Item(Strict):
    """Fields of every item. The model is not shown ``id`` and ``status``."""

    id: str | None = Field(None, max_length=256)
    status: ItemStatus | None = None

    def stored(self) -> Json:
        """Return the item as the API lists it, with an id."""
        raise NotImplementedError

    def _stored(self, prefix: str, **fields: Any) -> Json:
        return {"id": self.id or new_item_id(prefix), **fields, "status": "completed"}


class MessageItem(Item):
    """A message of the system, a developer, the user or the assistant."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Texts
    phase: str | None = None
    """Accepted, not used."""

    def stored(self) -> Json:
        if self.role == "assistant":
            parts = [output_text(text) for text in self.content]
        else:
            parts = [{"type": "input_text", "text": text} for text in self.content]
        return self._stored("msg", type="message", role=self.role, content=parts)


class ReasoningInput(Item):
    """Reasoning of the model in an earlier answer."""

    type: Literal["reasoning"]
    summary: OptionalTexts = Field(default_factory=list)
    content: OptionalTexts = Field(default_factory=list)
    encrypted_content: Any = None
    """Only null: the server's own reasoning is in ``content``, and others' cannot be read."""

    def model_post_init(self, context: Any) -> None:
        if self.encrypted_content is not None:
            raise refuse("input", "encrypted_content of a reasoning item is not supported")

    def stored(self) -> Json:
        return self._stored(
            "rs",
            type="reasoning",
            summary=[{"type": "summary_text", "text": text} for text in self.summary],
            content=[{"type": "reasoning_text", "text": text} for text in self.content],
        )


class CallItem(Item):
    """A call of a function that the model made."""

    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(max_length=256)
    arguments: str = "{}"
    parsed_arguments: Any = None
    """Accepted, not used: what the client's library made of ``arguments``."""
    namespace: str | None = Field(None, max_length=64)
    caller: None = None

    def stored(self) -> Json:
        return self._stored(
            "fc",
            type="function_call",
            call_id=self.call_id,
            name=self.name,
            arguments=self.arguments,
            **({"namespace": self.namespace} if self.namespace else {}),
        )


class CallOutputItem(Item):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: Texts
    name: str | None = Field(None, max_length=256)

    def stored(self) -> Json:
        return self._stored(
            "fco",
            type="function_call_output",
            call_id=self.call_id,
            output="\n".join(self.output),
        )


KINDS = ("message", "reasoning", "function_call", "function_call_output")


def _known(value: object) -> object:
    """Refuse items of other types by name, and leave out nulls, which say nothing.

    OpenAI's client writes all fields that it knows when it dumps an item, and knows more with each
    version.
    """
    if not isinstance(value, dict):
        return value
    kind = _kind(value)
    if kind not in KINDS:
        cure = ": send the item itself" if kind == "item_reference" else ""
        raise refuse("input", f"items of type {kind[:50]} are not supported{cure}")
    return {name: each for name, each in value.items() if each is not None or name == "content"}


def _kind(value: Any) -> str:
    """Return the type of an item; a message may leave it out."""
    return str(value.get("type") or "message") if isinstance(value, dict) else "message"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningInput, Tag("reasoning")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")],
    Discriminator(_kind),
    BeforeValidator(_known),
]


def new_item_id(prefix: str) -> str:
    """Return the id of a new item: ``msg_…``."""
    return f"{prefix}_{uuid.uuid4().hex}"


def output_text(text: str, logprobs: Sequence[Json] = ()) -> Json:
    """Return a text as part of an answer."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
