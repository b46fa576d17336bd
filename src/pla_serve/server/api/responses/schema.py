"""Body of ``POST /v1/responses``. Unknown fields are refused, as on the other endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pla_serve.server.api.formats import Json
from pla_serve.server.api.messages import MAX_MESSAGES
from pla_serve.server.api.responses.items import InputItem
from pla_serve.server.api.responses.tools import Choice, ResponseTool
from pla_serve.server.api.schema import MAX_LOGPROBS, Stop, TierField
from pla_serve.server.api.strict import Strict, at_most, refuse, wrong
from pla_serve.server.api.tool_schema import MAX_TOOLS

LOGPROBS = "message.output_text.logprobs"
"""Entry of ``include`` that asks for log probabilities."""
INCLUDABLE = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]
"""All but the first change nothing, as no answer here has the items that they are about."""
MOST_METADATA = 16
MOST_LABEL = 1024
"""Characters of a label that the answer repeats, such as the user's."""
Label = Annotated[str, Field(max_length=MOST_LABEL)]


def _read_input(value: object) -> object:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    return value


Items = Annotated[
    list[InputItem],
    Field(max_length=MAX_MESSAGES, fail_fast=True),
    BeforeValidator(_read_input, json_schema_input_type=str | list[InputItem]),
]


class TextFormat(Strict):
    """Form of the answer's text; a schema stands beside its type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(default=None, max_length=256)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> TextFormat:
        wants = self.type == "json_schema"
        if wants and (self.schema_ is None or self.name is None):
            raise wrong("text", "text.format of type json_schema needs a name and a schema")
        if not wants and self.schema_ is not None:
            raise wrong("text", "only text.format of type json_schema has a schema")
        return self

    def shown(self) -> Json:
        """Return the format as an answer repeats it."""
        fields = {
            "type": self.type,
            "name": self.name,
            "description": self.description,
            "schema": self.schema_,
            "strict": self.strict,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def chat_format(self) -> Json:
        """Return the ``response_format`` of a chat request that says the same."""
        fields = self.shown()
        kind = fields.pop("type")
        return {"type": kind, kind: fields} if fields else {"type": kind}


class TextOptions(Strict):
    """``text`` of a request."""

    format: TextFormat = TextFormat()
    verbosity: Literal["medium"] | None = None
    """Only the default: no chat template knows others."""


class ReasoningOptions(Strict):
    """``reasoning`` of a request."""

    effort: str | None = Field(default=None, max_length=32)
    summary: Literal["auto", "concise", "detailed"] | None = None
    """Accepted, not used: the reasoning itself is in the answer, without a summary."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """Older name of ``summary``."""


class ResponseStreamOptions(Strict):
    """``stream_options`` of a request."""

    include_obfuscation: bool = False
    """Accepted, not used."""


class Unused(Strict):
    """Fields that cannot change an answer here. They are accepted, and some are repeated in it."""

    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            BeforeValidator(at_most(MOST_METADATA)),
        ]
        | None
    ) = None
    """As OpenAI bounds it: answers are held, and repeat it, for as long as they are made."""
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    max_tool_calls: int | None = Field(None, ge=1)
    """The bound on calls of tools that a server runs itself. There are no such tools here, so any
    bound is kept."""
    stream_options: ResponseStreamOptions | None = None
    client_metadata: dict[str, Any] | None = None


class SharedFields(Strict):
    """Fields that chat requests have by the same name, and check."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: Stop = ()
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    service_tier: TierField | None = None
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None


class ResponsesRequest(Unused, SharedFields):
    """Body of ``POST /v1/responses``."""

    model: str | None = None
    input: Items
    instructions: str | None = None
    """A system message before all others. It holds for this answer only."""
    tools: list[ResponseTool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: Choice = None
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    max_output_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: Annotated[list[INCLUDABLE], Field(max_length=16)] | None = None
    truncation: Literal["disabled"] | None = None
    """A conversation that does not fit is refused; ``auto`` is not supported."""
    previous_response_id: str | None = Field(None, max_length=256)
    store: bool = True
    """Keep the answer, so that it can be asked for and continued."""
    background: bool = False
    """Answer at once, before there is any text; it is asked for by its id."""
    stream: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> ResponsesRequest:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "stream_options needs stream: true")
        if self.background and self.stream:
            raise refuse("background", "background is not supported together with stream")
        if self.background and not self.store:
            raise wrong("background", "background needs store: true")
        return self

    @property
    def logprobs(self) -> int | None:
        """Likeliest tokens wanted beside each token of the text; None for no log probabilities."""
        if LOGPROBS in (self.include or ()):
            return self.top_logprobs or 0
        return self.top_logprobs or None
