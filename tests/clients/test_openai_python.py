"""The official Python client: chat, responses, their helpers, and the agents built on them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import ScriptedServer, call
from tests.server.server_harness import MODEL

PARIS = call("get_weather", city="Paris")
THOUGHT = "<think>\nI have to look.\n</think>\n\n"


class Weather(BaseModel):
    """What is asked for as an object."""

    city: str
    degrees: int


class get_weather(BaseModel):  # noqa: N801 - the function is called like that
    """Weather of a city."""

    city: str


CHAT_TOOL: Any = openai.pydantic_function_tool(get_weather)
RESPONSE_TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": get_weather.model_json_schema(),
    "strict": False,
}


@pytest.fixture(scope="module")
def client(scripted: ScriptedServer) -> openai.OpenAI:
    return scripted.live.client()


def result_of(arguments: str) -> str:
    """Run the function."""
    assert json.loads(arguments) == {"city": "Paris"}
    return "sunny, 21 degrees"


def test_chat(scripted: ScriptedServer, client: openai.OpenAI) -> None:
    scripted.say("by plain chat", THOUGHT + "I look." + PARIS, "It is sunny.", "You are welcome.")
    messages: list[Any] = [{"role": "user", "content": "Weather in Paris, by plain chat?"}]
    options: Any = {"model": MODEL, "messages": messages, "tools": [CHAT_TOOL]}
    message = client.chat.completions.create(**options).choices[0].message
    assert message.content == "I look."
    messages.append(message.model_dump())
    for each in message.tool_calls:
        content = result_of(each.function.arguments)
        messages.append({"role": "tool", "tool_call_id": each.id, "content": content})
    message = client.chat.completions.create(**options).choices[0].message
    assert message.content == "It is sunny."
    messages += [message, {"role": "user", "content": "Thanks!"}]
    last = client.chat.completions.create(**options).choices[0].message
    assert last.content == "You are welcome."


def test_streamed_chat(scripted: ScriptedServer, client: openai.OpenAI) -> None:
    scripted.say("by streams", "I look." + PARIS, "It is sunny.")
    messages: list[Any] = [{"role": "user", "content": "Weather in Paris, by streams?"}]
    options: Any = {"model": MODEL, "messages": messages, "tools": [CHAT_TOOL]}
    with client.chat.completions.stream(**options) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"content.delta", "tool_calls.function.arguments.done"} <= kinds
    (each,) = message.tool_calls
    assert each.function.parsed_arguments == get_weather(city="Paris")
    messages.append(message.model_dump())
    content = result_of(each.function.arguments)
    messages.append({"role": "tool", "tool_call_id": each.id, "content": content})
    with client.chat.completions.stream(**options) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == "It is sunny."


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydantic of the client's own dump
def test_parsed_chat(scripted: ScriptedServer, client: openai.OpenAI) -> None:
    scripted.say("as an object", '{"city": "Paris", "degrees": 21}')
    messages: Any = [{"role": "user", "content": "Weather in Paris, as an object?"}]
    answer = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Paris", degrees=21)
    messages += [answer.choices[0].message.model_dump(), {"role": "user", "content": "Again."}]
    again = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Weather)
    assert again.choices[0].message.parsed is not None


@pytest.mark.parametrize("keeps", [True, False])
def test_responses(scripted: ScriptedServer, client: openai.OpenAI, keeps: bool) -> None:
    """Whether the server keeps the conversation, or the client sends it again each time."""
    about = f"by responses, kept {keeps}"
    scripted.say(about, THOUGHT + "I look." + PARIS, "It is sunny.", "You are welcome.")
    conversation: list[Any] = [{"role": "user", "content": f"Weather in Paris, {about}?"}]
    options: Any = {"model": MODEL, "tools": [RESPONSE_TOOL], "store": keeps}
    answer = client.responses.create(input=conversation, **options)
    assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]
    for next_text in ("It is sunny.", "You are welcome."):
        more: list[Any] = [{"role": "user", "content": "Thanks!"}]
        if (each := answer.output[-1]).type == "function_call":
            output = result_of(each.arguments)
            more = [{"type": "function_call_output", "call_id": each.call_id, "output": output}]
        if keeps:
            answer = client.responses.create(input=more, previous_response_id=answer.id, **options)
        else:
            conversation += [*(item.model_dump() for item in answer.output), *more]
            answer = client.responses.create(input=conversation, **options)
        assert answer.output_text == next_text


def test_streamed_responses(scripted: ScriptedServer, client: openai.OpenAI) -> None:
    scripted.say("by events", THOUGHT + "I look." + PARIS, "It is sunny.")
    options: Any = {"model": MODEL, "tools": [RESPONSE_TOOL]}
    with client.responses.stream(input="Weather in Paris, by events?", **options) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_response()
    assert "response.reasoning_text.delta" in kinds
    assert "response.function_call_arguments.delta" in kinds
    each: Any = answer.output[-1]
    output: Any = {
        "type": "function_call_output",
        "call_id": each.call_id,
        "output": result_of(each.arguments),
    }
    with client.responses.stream(
        input=[output], previous_response_id=answer.id, **options
    ) as stream:
        stream.until_done()
        assert stream.get_final_response().output_text == "It is sunny."


def test_parsed_responses(scripted: ScriptedServer, client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "input": "A parsed response?", "text_format": Weather}
    scripted.say("A parsed response", '{"city": "Paris", "degrees": 21}')
    answer = client.responses.parse(**options)
    assert answer.output_parsed == Weather(city="Paris", degrees=21)
    with client.responses.stream(**options) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == Weather(city="Paris", degrees=21)


def test_the_client_for_asyncio(scripted: ScriptedServer) -> None:
    scripted.say("at the same time", "Yes.")

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=scripted.url, api_key="k") as client:
            asked = [
                client.responses.create(model=MODEL, input="Two at the same time?")
                for _ in range(2)
            ]
            return [answer.output_text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == ["Yes.", "Yes."]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("streams", [False, True])
def test_agents(scripted: ScriptedServer, api: str, streams: bool) -> None:
    """OpenAI's agents: a tool, its result, and an answer as an object."""
    import agents

    about = f"agents by {api}, streamed {streams}"
    scripted.say(about, THOUGHT + PARIS, '{"city": "Paris", "degrees": 21}')
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Weather of a city."""
        asked.append(city)
        return "sunny, 21 degrees"

    async def run() -> Any:
        async with openai.AsyncOpenAI(base_url=scripted.url, api_key="k") as client:
            kinds = {
                "chat": agents.OpenAIChatCompletionsModel,
                "responses": agents.OpenAIResponsesModel,
            }
            agent = agents.Agent(
                name="weather",
                instructions="Answer about the weather.",
                model=kinds[api](model=MODEL, openai_client=client),
                tools=[get_weather],
                output_type=Weather,
            )
            if not streams:
                return (await agents.Runner.run(agent, about)).final_output
            running = agents.Runner.run_streamed(agent, about)
            async for _ in running.stream_events():
                pass
            return running.final_output

    assert asyncio.run(run()) == Weather(city="Paris", degrees=21)
    assert asked == ["Paris"]
