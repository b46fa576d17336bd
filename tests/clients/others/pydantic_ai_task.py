"""pydantic-ai: agents with a tool and an object as answer, by chat and by responses."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    """Weather of a city."""

    city: str
    degrees: int


async def ask(model: Model, output: Any, about: str) -> None:
    """Let an agent use a tool and answer, whole and as a stream."""
    asked: list[str] = []
    agent = Agent(model, output_type=output, instructions="Answer about the weather.")

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Weather of a city."""
        asked.append(city)
        return "sunny, 21 degrees"

    found = (await agent.run(about)).output
    assert found == Weather(city="Paris", degrees=21), found
    async with agent.run_stream(about) as streamed:
        assert await streamed.get_output() == found
    assert asked == ["Paris", "Paris"], asked


async def main(url: str, name: str) -> None:
    provider = OpenAIProvider(base_url=url, api_key="k")
    for api, kind in (("chat", OpenAIChatModel), ("responses", OpenAIResponsesModel)):
        model = kind(name, provider=provider)
        await ask(model, Weather, f"pydantic-ai by {api}, answered by a tool")
        await ask(model, NativeOutput(Weather), f"pydantic-ai by {api}, answered by its form")
    print("all done")


asyncio.run(main(*sys.argv[1:]))
