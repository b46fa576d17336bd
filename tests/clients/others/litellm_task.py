"""litellm: a tool, its result, a stream, by chat and by responses."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}


def main(url: str, name: str) -> None:
    options: Any = {"model": f"openai/{name}", "api_base": url, "api_key": "k", "num_retries": 0}
    function = {"name": "get_weather", "parameters": PARAMETERS}
    tools = [{"type": "function", "function": function}]
    messages: list[Any] = [{"role": "user", "content": "litellm, a tool by chat"}]
    message = litellm.completion(messages=messages, tools=tools, **options).choices[0].message
    messages.append(message.model_dump())
    for call in message.tool_calls:
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    stream = litellm.completion(messages=messages, tools=tools, stream=True, **options)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "It is sunny.", text
    asked: Any = {"tools": [{"type": "function", **function}], **options}
    first = litellm.responses(input="litellm, a tool by responses", **asked)
    call = next(item for item in first.output if item.type == "function_call")
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: list[Any] = [
        {"role": "user", "content": "litellm, a tool by responses"},
        *(item.model_dump() for item in first.output),
        result,
    ]
    last = litellm.responses(input=items, **asked)
    assert last.output[-1].content[0].text == "It is sunny.", last
    print("all done")


main(*sys.argv[1:])
