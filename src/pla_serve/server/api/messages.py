"""Messages of a chat request.

Clients send the server's own answers back, as ``answer.choices[0].message.model_dump()`` gives
them. Fields of such a message that say nothing to the model are accepted and not used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, field_validator, model_validator

from pla_serve.server.api.strict import Strict, refuse

MAX_MESSAGES = 2048
"""Messages of a conversation, and parts of one message."""
MAX_CALLS = 128
"""Calls of tools in one message."""
MAX_ANNOTATIONS = 1024


def read_content(value: object) -> str | None:
    """Text, or parts of type text joined by newlines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("content must be a string or a list of parts")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"at most {MAX_MESSAGES} parts of content, not {len(value)}")
    return "\n".join(_read_part(part) for part in value)


def _read_part(part: object) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("a content part must be an object with a type")
    kind = part["type"]
    if kind not in ("text", "refusal"):
        raise refuse("messages", f"content parts of type {kind[:50]} are not supported, only text")
    if not isinstance(part.get(kind), str):
        raise ValueError(f"a content part of type {kind} must have a string {kind}")
    return str(part[kind])


TextContent = Annotated[
    str | None,
    PlainValidator(read_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "null"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]


class CalledFunction(Strict):
    """Name and arguments of a call that the model made."""

    name: str = Field(max_length=256)
    arguments: str = "{}"
    """JSON of an object; an empty text is an object without members."""
    parsed_arguments: Any = None
    """Accepted, not used: what the client's library made of ``arguments``."""


class MessageToolCall(Strict):
    """A call in a message of the assistant."""

    id: str | None = Field(None, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Accepted, not used: the call's place in a stream."""


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: TextContent = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """Another name of ``reasoning_content``."""
    tool_calls: list[MessageToolCall] = Field(
        default_factory=list, max_length=MAX_CALLS, fail_fast=True
    )
    tool_call_id: str | None = Field(None, max_length=256)
    # The rest is accepted and not used.
    id: str | None = None
    annotations: Annotated[list[dict[str, Any]], Field(max_length=MAX_ANNOTATIONS)] | None = None
    parsed: Any = None
    cache_control: dict[str, Any] | None = None
    provider_specific_fields: dict[str, Any] | None = None
    """litellm adds it to the messages that it returns."""
    # The rest is accepted only as null.
    audio: Any = None
    function_call: Any = None

    @field_validator("audio", "function_call", mode="before")
    @classmethod
    def _only_null(cls, value: Any, info: Any) -> Any:
        raise refuse("messages", f"{info.field_name} of a message is not supported")

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} must have content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of role assistant can have tool_calls")
        return self
