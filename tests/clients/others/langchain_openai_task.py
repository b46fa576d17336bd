"""langchain-openai: a tool, its result, a stream and an object, by chat and by responses."""

from __future__ import annotations

import sys
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


class Weather(BaseModel):
    """Weather of a city."""

    city: str
    degrees: int


@tool
def get_weather(city: str) -> str:
    """Weather of a city."""
    assert city == "Paris"
    return "sunny, 21 degrees"


def main(url: str, name: str) -> None:
    for api in ("chat", "responses"):
        options: Any = {"base_url": url, "api_key": "k", "model": name}
        model = ChatOpenAI(**options, use_responses_api=api == "responses", max_retries=0)
        bound = model.bind_tools([get_weather])
        messages: list[Any] = [HumanMessage(f"LangChain, a tool by {api}")]
        answer = bound.invoke(messages)
        messages.append(answer)
        for call in answer.tool_calls:
            result = get_weather.invoke(call["args"])
            messages.append(ToolMessage(result, tool_call_id=call["id"]))
        text = "".join(chunk.text for chunk in bound.stream(messages))
        assert text == "It is sunny.", text
        asks = model.with_structured_output(Weather, method="json_schema")
        found = asks.invoke(f"LangChain, an object by {api}")
        assert found == Weather(city="Paris", degrees=21), found
    print("all done")


main(*sys.argv[1:])
