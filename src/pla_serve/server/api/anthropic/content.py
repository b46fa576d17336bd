"""Content blocks of messages that clients send."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from pla_serve.server.api.messages import MAX_ANNOTATIONS, MAX_MESSAGES
from pla_serve.server.api.strict import Strict, refuse

CacheControl = dict[str, Any]
"""Accepted on every block, and not used: prefixes are cached without being told."""


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None
    # Accepted and not used: what the client's library adds to an answer.
    citations: Annotated[list[Any], Field(max_length=MAX_ANNOTATIONS)] | None = None
    parsed_output: Any = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None
    """Accepted, not checked: reasoning of others is taken as well."""
    cache_control: CacheControl | None = None


class RedactedThinkingBlock(Strict):
    """Reasoning that only its author can read; it is left out of the prompt."""

    type: Literal["redacted_thinking"]
    data: str
    cache_control: CacheControl | None = None


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: str = Field(max_length=256)
    name: str = Field(max_length=256)
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: dict[str, Any] | None = None
    """Accepted, not used."""
    toolset_name: str | None = None
    """Accepted, not used."""


def _blocks(value: object, known: tuple[str, ...]) -> object:
    """Return content as a list of blocks; those of types that are not ``known`` are refused."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("content must be a string or a list of blocks")
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"at most {MAX_MESSAGES} blocks, not {len(value)}")
    for block in value:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise ValueError("a content block must be an object with a type")
        if kind not in known:
            message = f"content blocks of type {kind[:50]} are not supported here"
            raise refuse("messages", f"{message}: {', '.join(known)} are")
    return value


def _described(known: tuple[str, ...]) -> WithJsonSchema:
    block = {
        "type": "object",
        "properties": {"type": {"enum": list(known)}},
        "required": ["type"],
    }
    return WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": block}]})


TextBlocks = Annotated[
    list[TextBlock],
    BeforeValidator(lambda value: _blocks(value, ("text",))),
    _described(("text",)),
]


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=256)
    content: TextBlocks = Field(default_factory=list)
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
KINDS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")
Content = Annotated[
    list[Block], BeforeValidator(lambda value: _blocks(value, KINDS)), _described(KINDS)
]


def joined(content: list[TextBlock]) -> str:
    """Return texts joined by newlines, as chat joins the parts of a message."""
    return "\n".join(block.text for block in content)
