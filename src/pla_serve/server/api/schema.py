"""The bodies of requests. Strict: no coercion, no unknown fields, no NaN.

A field that OpenAI clients send by default and that cannot change the answer is accepted and not
used (`Ignored`); every other field that the server does not have is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator

from pla_serve.server.api.messages import MAX_MESSAGES, ChatMessage
from pla_serve.server.api.strict import Strict, at_most, refuse, whole_numbers, wrong
from pla_serve.server.api.tool_schema import (
    MAX_TOOLS,
    NamedFunction,
    ToolChoiceField,
    ToolDefinition,
)
from pla_serve.server.tools.tool import ToolUse

MAX_STOPS = 16
MAX_SEQUENCES = 256
"""Most sequences of one HTTP request: prompts times n."""
MAX_LOGPROBS = 20
MAX_CHOICES = 1024
"""Texts that ``guided_choice`` may offer."""
MAX_BIASES = 300
"""Entries of ``logit_bias``, as OpenAI has it."""
MAX_METADATA = 64
INTS_AT_ONCE = 50_000
COMPLETION_TOKENS = 16
"""Default max_tokens of /v1/completions, as OpenAI and vLLM have it."""

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TokenField = Annotated[int, Field(ge=0, le=2**31 - 1)]


def read_prompts(value: object) -> list[str | list[int]]:
    """Return any of the four shapes of ``prompt`` as a list of texts and token lists.

    A union of lists would report, for every item, each member that it does not fit.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("give a string, token ids, or a non-empty list of one of these")
    value = whole_numbers(value)
    if all_ints(value):
        return [value]
    if len(value) > MAX_SEQUENCES:
        raise ValueError(f"at most {MAX_SEQUENCES} prompts in one request, not {len(value)}")
    value = [whole_numbers(item) if isinstance(item, list) else item for item in value]
    for index, item in enumerate(value):
        if not isinstance(item, str) and not (isinstance(item, list) and all_ints(item)):
            raise ValueError(f"item {index} is neither a string nor a list of token ids")
    return value


def all_ints(items: list[Any]) -> bool:
    """A few at a time, so that other threads get their turn. A bool is an int to isinstance."""
    starts = range(0, len(items), INTS_AT_ONCE)
    return all(set(map(type, items[start : start + INTS_AT_ONCE])) <= {int} for start in starts)


def read_stop(value: object) -> tuple[str, ...]:
    stops = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop must be a string or a list of strings")
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= 1000 for stop in stops):
        raise ValueError(f"at most {MAX_STOPS} stop strings of 1 to 1000 characters")
    return tuple(stops)


_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(read_prompts),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TOKENS, _TEXTS, {**_TEXTS, "items": _TOKENS}]}),
]
Stop = Annotated[
    tuple[str, ...],
    PlainValidator(read_stop),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, {"type": "null"}]}),
]


Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
Biases = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    BeforeValidator(at_most(MAX_BIASES)),
    Field(json_schema_extra={"maxProperties": MAX_BIASES}),
]
Metadata = Annotated[dict[str, Any], BeforeValidator(at_most(MAX_METADATA))]


class StreamOptions(Strict):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    """Usage so far in every chunk."""
    include_obfuscation: bool = False
    """Accepted, not used."""


class JsonSchemaFormat(Strict):
    name: str = Field(max_length=256)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema must be given with type json_schema, and only with it")
        return self


class StructuredOutputs(Strict):
    """vLLM's field of this name: exactly one constraint."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None


class Ignored(Strict):
    """Fields that do not change the answer."""

    user: str | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Added to every request by the routers of SGLang and vLLM.
    no_stop_trim: Literal[False] | None = None
    return_hidden_states: Literal[False] | None = None


TierField = Annotated[str, Field(max_length=64)]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class GenerationRequest(Ignored):
    """What both endpoints share. Fields that OpenAI lacks are vLLM's where it has them."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    min_tokens: int = Field(0, ge=0, le=2**31 - 1)
    n: int | None = Field(None, ge=1, le=MAX_SEQUENCES)
    best_of: int | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    """-1 and 0 keep all."""
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: Biases | None = None
    stop: Stop = ()
    stop_token_ids: Annotated[list[TokenField], Field(max_length=256, fail_fast=True)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    prompt_logprobs: TopLogprobs | None = None
    """Log probabilities of the prompt's tokens, and of so many of the likeliest in each place."""
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    """The prefix cache is shared only between requests of one API key with the same salt."""
    priority: int = Field(0, ge=-(2**31), le=2**31 - 1)
    """Smaller is sooner, among the requests of one API key; refused unless --enable-priority."""
    service_tier: TierField | None = None
    """Name of one of the server's tiers; auto and None: by the API key."""
    ttft_slo_ms: float | None = Field(None, gt=0, le=1e9)
    """The first token is due this many milliseconds after arrival."""
    tpot_slo_ms: float | None = Field(None, ge=1, le=1e6)
    """Each further token is due this many milliseconds after the one before it."""
    include_reasoning: bool | None = None
    """False: the answer of chat does not show its reasoning."""
    separate_reasoning: bool | None = None
    """False: the reasoning of chat stays in the content, with its markers; SGLang's name."""
    stream_reasoning: bool | None = None
    """Accepted, not used: reasoning is streamed as it comes."""

    @model_validator(mode="after")
    def _consistent(self) -> GenerationRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise refuse("best_of", "best_of is only supported if it equals n")
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "stream_options needs stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise wrong("prompt_logprobs", "prompt_logprobs are not given with stream: true")
        return self


class CompletionRequest(GenerationRequest):
    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    """0: nothing is generated; the prompt is scored, with ``echo`` and ``logprobs``."""
    echo: bool = False
    logprobs: TopLogprobs | None = None
    add_special_tokens: bool = True
    """Whether the tokenizer adds its own (BOS) to text prompts."""

    @property
    def scores_prompt(self) -> int | None:
        """Likeliest tokens that are wanted in each place of the prompt; None for no scores."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((each for each in wanted if each is not None), default=None)

    @property
    def output_limit(self) -> int:
        """Most output tokens of a choice."""
        return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class ChatRequest(GenerationRequest):
    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    """Chat templates write their special tokens themselves."""
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[ToolDefinition] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    tool_choice: ToolChoiceField = None
    """With none, tools are shown to the model and calls are not read out of its answer."""
    parallel_tool_calls: bool = True
    """False: at most one call in an answer."""
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Effort | None = None
    """For templates that know it; it also turns reasoning on (or off: none) where they can."""
    thinking_token_budget: int | None = Field(None, ge=1, le=2**31 - 1)
    """Most tokens of reasoning, which is then closed; the name is vLLM's."""

    @model_validator(mode="after")
    def _chats(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs needs logprobs: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong("continue_final_message", "set add_generation_prompt: false beside it")
        if self.continue_final_message and self.messages[-1].content is None:
            raise wrong("continue_final_message", "the last message has no content")
        return self

    @model_validator(mode="after")
    def _choice_of_tools(self) -> ChatRequest:
        names = [each.function.name for each in self.tools]
        if len(set(names)) < len(names):
            raise wrong("tools", "two tools have the same name")
        if self.tool_choice == "required" and not names:
            raise wrong("tool_choice", "tool_choice required needs tools")
        if isinstance(self.tool_choice, NamedFunction) and self.tool_choice.name not in names:
            raise wrong("tool_choice", f"there is no tool {self.tool_choice.name[:128]!r}")
        return self

    @property
    def scores_prompt(self) -> int | None:
        """As `CompletionRequest.scores_prompt`."""
        return self.prompt_logprobs

    @property
    def output_limit(self) -> int | None:
        """Most output tokens of a choice; None: what fits in the context."""
        return self.max_completion_tokens or self.max_tokens

    def tool_use(self) -> ToolUse | None:
        """Return how the answer may use tools; None if no calls are to be read out of it."""
        if not self.tools or self.tool_choice == "none":
            return None
        tools = {tool.name: tool for tool in (each.tool() for each in self.tools)}
        named = isinstance(self.tool_choice, NamedFunction)
        return ToolUse(
            tools,
            must_call=named or self.tool_choice == "required",
            may_call=(self.tool_choice.name,)
            if isinstance(self.tool_choice, NamedFunction)
            else tuple(tools),
            parallel=self.parallel_tool_calls and not named,
        )
