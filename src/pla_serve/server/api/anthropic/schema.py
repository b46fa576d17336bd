"""Bodies of ``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pla_serve.server.api.anthropic.content import CacheControl, Content, TextBlocks
from pla_serve.server.api.anthropic.errors import THREAD
from pla_serve.server.api.messages import MAX_MESSAGES
from pla_serve.server.api.schema import MAX_STOPS, TierField
from pla_serve.server.api.strict import Strict, at_most, refuse, wrong
from pla_serve.server.api.tool_schema import MAX_TOOLS, TOOL_NAME

MIN_BUDGET = 1024
"""Least ``thinking.budget_tokens``, as Anthropic has it."""
KEPT_EDITS = ("clear_thinking_20251015",)
"""Edits of the context that chat templates make of themselves."""


class MessageParam(Strict):
    role: Literal["user", "assistant", "system"]
    content: Content


class CustomTool(Strict):
    """A tool that the client runs."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    """Accepted, not used: arguments are streamed as they come."""
    defer_loading: Literal[False] | None = None
    allowed_callers: Annotated[list[Literal["direct"]], Field(max_length=1)] | None = None


def _client_tools(value: object) -> object:
    """Refuse tools that the server would have to run."""
    for tool in value if isinstance(value, list) else ():
        kind = tool.get("type") if isinstance(tool, dict) else None
        if kind is not None and kind != "custom":
            raise refuse(
                "tools", f"tools of type {str(kind)[:50]} run on the server, and it has none"
            )
    return value


class ToolChoiceParam(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> ToolChoiceParam:
        if (self.type == "tool") != (self.name is not None):
            raise wrong("tool_choice", "tool_choice needs a name with type tool, and only with it")
        return self


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=MIN_BUDGET, le=2**31 - 1)
    display: Literal["summarized", "omitted"] | None = None
    """Omitted: the reasoning is made and counted, and not shown. It is never summarised."""

    @model_validator(mode="after")
    def _has_budget(self) -> Thinking:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            raise wrong("thinking", "budget_tokens must be given with type enabled, and only then")
        return self


class JsonOutput(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: JsonOutput | None = None


class MetadataParam(Strict):
    user_id: str | None = None


def _kept_edits(value: object) -> object:
    edits = value.get("edits") if isinstance(value, dict) else None
    for edit in edits if isinstance(edits, list) else ():
        kind = edit.get("type") if isinstance(edit, dict) else None
        if kind not in KEPT_EDITS:
            raise refuse("context_management", f"the edit {str(kind)[:50]} is not supported")
    return value


class ConversationBody(Strict):
    """Fields of both endpoints: those that make the prompt."""

    model: str
    messages: Annotated[
        list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    system: TextBlocks = Field(default_factory=list)
    tools: Annotated[
        list[CustomTool],
        Field(max_length=MAX_TOOLS, fail_fast=True),
        BeforeValidator(_client_tools),
    ] = Field(default_factory=list)
    tool_choice: ToolChoiceParam | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None
    context_management: (
        Annotated[dict[str, Any], BeforeValidator(_kept_edits), BeforeValidator(at_most(8))] | None
    ) = None
    speed: Literal["standard"] | None = None
    """Accepted, not used."""
    thread: Any = None
    """Refused in the way that makes clients send whole conversations."""

    @field_validator("thread", mode="before")
    @classmethod
    def _no_threads(cls, value: Any) -> Any:
        raise refuse(THREAD, "thread is not supported: send the whole conversation")


class CountTokensRequest(ConversationBody):
    """Body of ``/v1/messages/count_tokens``."""


class MessagesRequest(ConversationBody):
    """Body of ``/v1/messages``."""

    max_tokens: int = Field(ge=1, le=2**31 - 1)
    """Fewer are made if the context has no room for them."""
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=MAX_STOPS)
    ] = Field(default_factory=list)
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1)
    metadata: MetadataParam | None = None
    """Accepted, not used."""
    service_tier: TierField | None = None
    """``standard_only`` is the tier named default; others as in chat."""

    @model_validator(mode="after")
    def _budget_fits(self) -> MessagesRequest:
        budget = self.thinking and self.thinking.budget_tokens
        if budget and budget >= self.max_tokens:
            raise wrong("thinking", "thinking.budget_tokens must be less than max_tokens")
        return self
