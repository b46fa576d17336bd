"""Translates Anthropic's bodies into chat requests."""

from __future__ import annotations

import json
from typing import Any

from pla_serve.policy.tiers import USUAL
from pla_serve.server.api.anthropic.content import (
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    joined,
)
from pla_serve.server.api.anthropic.schema import (
    ConversationBody,
    CustomTool,
    MessageParam,
    MessagesRequest,
    ToolChoiceParam,
)
from pla_serve.server.api.body import validate
from pla_serve.server.api.schema import ChatRequest
from pla_serve.server.errors import invalid
from pla_serve.server.reasoning.support import ReasoningSupport

Fields = dict[str, Any]
BILLING = "x-anthropic-billing-header"
"""Beginning of a system block that is not for the model; it differs from request to request."""
FAILED = "Error: "
"""Put before the result of a tool that failed, since templates have no field for it."""


def chat_request(body: ConversationBody, reasoning: ReasoningSupport) -> ChatRequest:
    """Return the chat request that asks for the same.

    Raises:
        ApiError: 400, a message cannot be said in chat.
    """
    fields: Fields = {"model": body.model, "messages": _messages(body)}
    if not fields["messages"]:
        raise invalid("the messages say nothing to the model", "messages")
    if fields["messages"][-1]["role"] == "assistant":
        if not fields["messages"][-1].get("content"):
            raise invalid("the last message has no text that an answer could continue", "messages")
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields |= _choice(body.tool_choice)
    fields |= _thinking(body, reasoning)
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "output", "schema": body.output_config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(body, MessagesRequest):
        fields |= _sampling(body)
    return validate(fields, ChatRequest)


def _sampling(body: MessagesRequest) -> Fields:
    return {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "service_tier": USUAL if body.service_tier == "standard_only" else body.service_tier,
    }


def _thinking(body: ConversationBody, reasoning: ReasoningSupport) -> Fields:
    """Return the fields that turn reasoning on or off; a bound only where it can be held."""
    fields: Fields = {}
    if body.output_config is not None and body.output_config.effort is not None:
        fields["reasoning_effort"] = body.output_config.effort
    thinking = body.thinking
    if thinking is None:
        return fields
    fields["chat_template_kwargs"] = reasoning.switches(on=thinking.type != "disabled")
    fields["include_reasoning"] = thinking.display != "omitted"
    if thinking.budget_tokens is not None and reasoning.bounds:
        fields["thinking_token_budget"] = thinking.budget_tokens
    return fields


def _tool(tool: CustomTool) -> Fields:
    function: Fields = {
        "name": tool.name,
        "parameters": {"type": "object", **tool.input_schema},
    }
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: ToolChoiceParam) -> Fields:
    fields: Fields = {"parallel_tool_calls": not choice.disable_parallel_tool_use}
    if choice.type == "tool":
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        fields["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
    return fields


def _messages(body: ConversationBody) -> list[Fields]:
    """Return the messages of chat.

    Results of tools are messages of their own, and turns of one role that follow each other are
    one message.
    """
    found: list[Fields] = []
    if system := _system(body):
        found.append({"role": "system", "content": system})
    for message in body.messages:
        for part in _parts(message):
            last = found[-1] if found else None
            if last is not None and last["role"] == part["role"] and part["role"] != "tool":
                _merge(last, part)
            else:
                found.append(part)
    return found


def _system(body: ConversationBody) -> str:
    return joined([block for block in body.system if not block.text.startswith(BILLING)])


def _parts(message: MessageParam) -> list[Fields]:
    """Return one message of Anthropic's as messages of chat, in order."""
    found: list[Fields] = []
    for block in message.content:
        part = _part(message.role, block)
        if part is None:
            continue
        if found and found[-1]["role"] == part["role"] != "tool":
            _merge(found[-1], part)
        else:
            found.append(part)
    return found


def _part(role: str, block: Any) -> Fields | None:
    """Return the message that one block is; None for blocks that say nothing to the model."""
    if isinstance(block, TextBlock):
        return {"role": role, "content": block.text}
    if isinstance(block, ToolResultBlock):
        if role != "user":
            raise invalid(f"a tool_result stands in a message of role {role}, not user", "messages")
        text = joined(block.content)
        if block.is_error and not text.startswith(FAILED):
            text = FAILED + text
        return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}
    if role != "assistant":
        raise invalid(f"a {block.type} block stands in a message of role {role}", "messages")
    if isinstance(block, ThinkingBlock):
        return {"role": role, "reasoning_content": block.thinking}
    if isinstance(block, ToolUseBlock):
        function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
        call = {"id": block.id, "type": "function", "function": function}
        return {"role": role, "tool_calls": [call]}
    return None


def _merge(message: Fields, more: Fields) -> None:
    """Append what ``more`` says to a message of the same role."""
    for name in ("content", "reasoning_content"):
        if name in more:
            texts = [message[name]] if message.get(name) else []
            message[name] = "\n".join([*texts, more[name]])
    if "tool_calls" in more:
        message["tool_calls"] = [*message.get("tool_calls", []), *more["tool_calls"]]
