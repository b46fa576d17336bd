"""Messages as chat templates take them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pla_serve.server.api.messages import ChatMessage, MessageToolCall
from pla_serve.server.api.schema import ChatRequest
from pla_serve.server.bounded_json import decode
from pla_serve.server.errors import invalid
from pla_serve.server.tools.formats.plain import instructions

Message = dict[str, Any]
SHORT_ID = 9
"""Characters of a call's id in templates of Mistral, which refuse ids of other lengths."""


def template_messages(request: ChatRequest, template: str) -> list[Message]:
    """Return the messages of ``request`` as ``template`` takes them.

    Fields that are empty are left out, and arguments of calls are objects. A template that shows no
    tools gets them as text: the functions in a system message, calls in the messages of the
    assistant, and results in messages of the user.

    Raises:
        ApiError: 400, the arguments of a call are no JSON object.
    """
    short_ids = "length 9" in template or "|length != 9" in template
    messages = [_message(message, template, short_ids) for message in request.messages]
    shows_tools = "tools" in template
    called = any(message.tool_calls for message in request.messages)
    if called and not shows_tools and "tool_calls" not in template:
        messages = _as_text(request.messages, messages)
    use = None if shows_tools else request.tool_use()
    return messages if use is None else _with_system(messages, instructions(use.tools))


def _message(message: ChatMessage, template: str, short_ids: bool) -> Message:
    fields: Message = {"role": message.role, "content": message.content or ""}
    if message.role == "developer" and "developer" not in template:
        fields["role"] = "system"
    for name in ("name", "refusal"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    reasoning = message.reasoning_content or message.reasoning
    if reasoning is not None:
        fields |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if ".thinking" in template and not message.content:
            # gpt-oss: its template takes either the text or the reasoning of a message.
            fields["thinking"] = reasoning
    if message.tool_calls:
        fields["tool_calls"] = [_call(call, short_ids) for call in message.tool_calls]
    if message.tool_call_id is not None:
        fields["tool_call_id"] = _id(message.tool_call_id, short_ids)
    return fields


def _call(call: MessageToolCall, short_ids: bool) -> Message:
    function = {"name": call.function.name, "arguments": arguments_of(call)}
    fields: Message = {"type": "function", "function": function}
    if call.id is not None:
        fields["id"] = _id(call.id, short_ids)
    return fields


def arguments_of(call: MessageToolCall) -> dict[str, Any]:
    """Return the arguments of an earlier call.

    Raises:
        ApiError: 400, they are no JSON object.
    """
    text = call.function.arguments.strip() or "{}"
    found = decode(text.encode(), "an arguments field of a tool call")
    if not isinstance(found, dict):
        raise invalid("an arguments field of a tool call is no JSON object", "messages")
    return found


def _id(id: str, short: bool) -> str:
    if not short or (len(id) == SHORT_ID and id.isascii() and id.isalnum()):
        return id
    return hashlib.sha256(id.encode()).hexdigest()[:SHORT_ID]


def _as_text(given: list[ChatMessage], messages: list[Message]) -> list[Message]:
    """Write calls and results as text, in the format of `plain.instructions`."""
    names: dict[str, str] = {}
    found: list[Message] = []
    results_before = False
    for source, message in zip(given, messages, strict=True):
        calls = message.pop("tool_calls", [])
        message.pop("tool_call_id", None)
        for written, call in zip(calls, source.tool_calls, strict=True):
            names[call.id or ""] = call.function.name
            line = json.dumps(written["function"], ensure_ascii=False)
            message["content"] += ("\n" if message["content"] else "") + line
        if source.role == "tool":
            name = names.get(source.tool_call_id or "", source.name or "the function")
            text = f"Result of {name}:\n{source.content}"
            if results_before:
                found[-1]["content"] += "\n" + text
                continue
            message = {"role": "user", "content": text}
        results_before = source.role == "tool"
        found.append(message)
    return found


def _with_system(messages: list[Message], text: str) -> list[Message]:
    if messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}".strip()}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
