"""Translates items into the messages of a chat request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pla_serve.server.api.body import explain, validate
from pla_serve.server.api.formats import Json
from pla_serve.server.api.responses.items import (
    CallItem,
    CallOutputItem,
    InputItem,
    MessageItem,
    ReasoningInput,
)
from pla_serve.server.api.responses.schema import ResponsesRequest, SharedFields
from pla_serve.server.api.responses.tools import flat_name
from pla_serve.server.api.schema import ChatRequest
from pla_serve.server.errors import ApiError, invalid

PARTS = ("reasoning_content", "content", "tool_calls")
"""Parts of a message of the assistant, in the order in which they come."""
AnyItem = MessageItem | ReasoningInput | CallItem | CallOutputItem
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "logprobs": "top_logprobs",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of chat requests that are called otherwise here."""
ITEMS: TypeAdapter[list[AnyItem]] = TypeAdapter(list[InputItem])


def chat_request(body: ResponsesRequest, before: Sequence[AnyItem]) -> ChatRequest:
    """Return the chat request that asks for the same answer.

    Args:
        body: the request.
        before: items of the conversation that it continues.

    Raises:
        ApiError: 400, a field is out of range or contradicts another.
    """
    shared = {name: getattr(body, name) for name in SharedFields.model_fields}
    fields: Json = {
        **{name: value for name, value in shared.items() if value is not None},
        "messages": messages([*before, *body.input], body.instructions),
        "tools": [each for tool in body.tools for each in tool.chat_tools()],
        "tool_choice": body.tool_choice,
        "response_format": body.text.format.chat_format(),
        "max_completion_tokens": body.max_output_tokens,
        "reasoning_effort": body.reasoning.effort,
    }
    if body.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": body.logprobs}
    given = {name: value for name, value in fields.items() if value is not None}
    with errors_renamed():
        return validate(given, ChatRequest)


def messages(items: Sequence[AnyItem], instructions: str | None) -> list[Json]:
    """Return the messages of a conversation.

    Instructions and the system's messages at the beginning are one message: many templates take
    only one, and only there. Reasoning, text and calls that follow each other are one message of
    the assistant.
    """
    found: list[Json] = []
    opening = list(takewhile(lambda text: text is not None, map(_system_text, items)))
    if instructions or len(opening) > 1:
        told = filter(None, [instructions, *opening])
        found.append({"role": "system", "content": "\n\n".join(told)})
        items = items[len(opening) :]
    for item in items:
        _add(found, item)
    return found


def _system_text(item: AnyItem) -> str | None:
    """Return the text of a message of the system; None for other items."""
    if isinstance(item, MessageItem) and item.role in ("system", "developer"):
        return "\n".join(item.content)
    return None


def _add(found: list[Json], item: AnyItem) -> None:
    if isinstance(item, CallOutputItem):
        result = {"role": "tool", "tool_call_id": item.call_id, "content": "\n".join(item.output)}
        found.append(result)
    elif isinstance(item, CallItem):
        function = {"name": flat_name(item.namespace, item.name), "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        _assistant(found, not_with=()).setdefault("tool_calls", []).append(call)
    elif isinstance(item, ReasoningInput):
        text = "\n".join(item.content or item.summary)
        if text:
            _assistant(found, not_with=PARTS)["reasoning_content"] = text
    elif item.role == "assistant":
        _assistant(found, not_with=PARTS[1:])["content"] = "\n".join(item.content)
    else:
        found.append({"role": item.role, "content": "\n".join(item.content)})


def _assistant(found: list[Json], not_with: Sequence[str]) -> Json:
    """Return the message of the assistant that goes on; a new one if it has one of ``not_with``."""
    last = found[-1] if found else {}
    if last.get("role") != "assistant" or any(name in last for name in not_with):
        found.append({"role": "assistant"})
    return found[-1]


@contextmanager
def errors_renamed() -> Iterator[None]:
    """Let errors name the fields of this API where chat requests call them otherwise."""
    try:
        yield
    except ApiError as error:
        error.param = NAMES.get(error.param or "", error.param)
        error.message = re.sub(r"\bmax_tokens\b", "max_output_tokens", error.message)
        raise


def read_items(values: Any) -> list[AnyItem]:
    """Return items that the server has stored.

    Raises:
        ApiError: 400, the model wrote something that no request may have, such as the name of a
            function of a thousand characters.
    """
    try:
        return ITEMS.validate_python(values)
    except ValidationError as error:
        reason = explain(error).message
        raise invalid(
            f"the conversation cannot be continued, as an item of it is not valid: {reason}",
            "previous_response_id",
        ) from None
