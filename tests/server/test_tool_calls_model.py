"""Tool calls of a real model: SmolLM2, held to the format from its first token."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.server.server_harness import DEADLINE

pytestmark = pytest.mark.model

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time"}},
]
ASKED: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
WORDS = "serve --port 0 --threads 1 --kv-cache-gib 0.1 --max-model-len 2048 --served-model-name m"


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    command = [sys.executable, "-m", "pla_serve", *WORDS.split()]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as child:
        try:
            assert child.stdout is not None
            told = (child.stdout.readline() + child.stdout.readline()).decode()
            found = re.search(r"http://127\.0\.0\.1:\d+", told)
            assert found, f"not ready: {told}"
            options: Any = {"api_key": "k", "max_retries": 0, "timeout": 120}
            with openai.OpenAI(base_url=f"{found[0]}/v1", **options) as client:
                yield client
            child.send_signal(signal.SIGTERM)
            assert child.wait(DEADLINE) == 0
        finally:
            child.kill()


def fits(name: str, arguments: str) -> bool:
    found = json.loads(arguments)
    if name == "now":
        return found == {}
    assert set(found) == {"city", "unit"}
    return name == "get_weather" and found["unit"] in ("celsius", "fahrenheit")


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_fits_its_schema(client: openai.OpenAI, seed: int) -> None:
    options: Any = {
        "model": "m",
        "messages": ASKED,
        "tools": TOOLS,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 1.3,
        "seed": seed,
        "max_tokens": 100,
    }
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls
    assert fits(call.function.name, call.function.arguments)
    parts = [
        part
        for chunk in client.chat.completions.create(**options, stream=True)
        for part in chunk.choices[0].delta.tool_calls or []
    ]
    assert parts[0].function.name == call.function.name
    assert "".join(p.function.arguments for p in parts) == call.function.arguments


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_client_gets_calls_that_fit(client: openai.OpenAI, stream: bool) -> None:
    """A whole loop: a call that has to be made, its result, and an answer."""
    tools: Any = [
        {"name": tool["function"]["name"], "input_schema": tool["function"].get("parameters", {})}
        for tool in TOOLS
    ]
    messages = list(ASKED)
    options: Any = {"model": "m", "tools": tools, "max_tokens": 100}
    options["extra_body"] = {"temperature": 0}
    url = str(client.base_url).removesuffix("/v1/")
    with anthropic.Anthropic(base_url=url, api_key="k", max_retries=0, timeout=120) as theirs:

        def ask(choice: Any) -> Any:
            fields = {**options, "messages": messages, "tool_choice": choice}
            if not stream:
                return theirs.messages.create(**fields)
            with theirs.messages.stream(**fields) as events:
                return events.get_final_message()

        answer = ask({"type": "tool", "name": "get_weather"})
        assert answer.stop_reason == "tool_use"
        (call,) = answer.content
        assert call.name == "get_weather"
        assert set(call.input) == {"city", "unit"}
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny, 21 degrees"}
        messages += [
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": [result]},
        ]
        last = ask({"type": "auto"})
    assert last.usage.input_tokens + last.usage.cache_read_input_tokens > answer.usage.input_tokens
    for block in last.content:
        assert block.type == ("tool_use" if last.stop_reason == "tool_use" else "text")


def test_a_whole_turn_with_a_named_function(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    options: Any = {"model": "m", "tools": TOOLS, "temperature": 0, "max_tokens": 60}
    answer = client.chat.completions.create(messages=ASKED, tool_choice=named, **options)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert fits(call.function.name, call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny, 21 degrees"}
    last = client.chat.completions.create(
        messages=[*ASKED, message.model_dump(), result], tool_choice="auto", **options
    )
    assert last.usage.prompt_tokens > answer.usage.prompt_tokens
    for call in last.choices[0].message.tool_calls or []:
        if last.choices[0].finish_reason == "tool_calls":
            json.loads(call.function.arguments)


def test_a_required_call_of_the_responses_api(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "strict": True, **each["function"]} for each in TOOLS]
    options: Any = {"model": "m", "tools": tools, "max_output_tokens": 100}
    with client.responses.stream(
        input="What is the weather in Paris?",
        tool_choice="required",
        parallel_tool_calls=False,
        **options,
    ) as stream:
        stream.until_done()
        answer = stream.get_final_response()
    (call,) = answer.output
    assert call.type == "function_call"
    assert fits(call.name, call.arguments)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    last = client.responses.create(
        input=[result],
        previous_response_id=answer.id,
        **{**options, "max_output_tokens": 20},
    )
    assert last.status in ("completed", "incomplete")
    assert last.usage.input_tokens > answer.usage.input_tokens
