"""Answers in the format of each family, with what they mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from pla_serve.server.tools.events import AnswerReader
from pla_serve.server.tools.formats.deepseek import DeepSeekReader
from pla_serve.server.tools.formats.gemma import FUNCTION_GEMMA, GEMMA_4, GemmaReader
from pla_serve.server.tools.formats.granite import GraniteReader
from pla_serve.server.tools.formats.harmony import HarmonyReader
from pla_serve.server.tools.formats.hermes import HermesReader
from pla_serve.server.tools.formats.llama import LlamaJsonReader
from pla_serve.server.tools.formats.mistral import MistralReader
from pla_serve.server.tools.formats.plain import PlainJsonReader
from pla_serve.server.tools.formats.pythonic import PythonicReader
from pla_serve.server.tools.formats.qwen_coder import QwenCoderReader
from pla_serve.server.tools.tool import Tool

Call = tuple[str, dict[str, Any]]
TOOLS = {
    tool.name: tool
    for tool in (
        Tool(
            "get_weather",
            "Weather of a city",
            {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": "boolean"},
                },
            },
        ),
        Tool(
            "search",
            "Search for text",
            {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "where": {"type": "object"},
                },
            },
        ),
        Tool("now", "The time", {"type": "object", "properties": {}}),
    )
}


@dataclass(frozen=True, slots=True)
class Family:
    """How a family writes an answer, and what reads it."""

    reader: Callable[[], AnswerReader]
    write: Callable[[str, list[Call]], str]
    """Content and calls to text."""
    content_with_calls: bool = True
    """An answer may have both."""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _hermes(content: str, calls: list[Call]) -> str:
    blocks = [
        f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"
        for name, arguments in calls
    ]
    return "\n".join([content, *blocks] if content else blocks)


def _qwen_coder(content: str, calls: list[Call]) -> str:
    text = content
    for name, arguments in calls:
        text += f"\n<tool_call>\n<function={name}>\n"
        for key, value in arguments.items():
            shown = value if isinstance(value, str) else _json(value)
            text += f"<parameter={key}>\n{shown}\n</parameter>\n"
        text += "</function>\n</tool_call>"
    return text if content else text.lstrip()


def _llama(content: str, calls: list[Call]) -> str:
    return content + "; ".join(_json({"name": n, "parameters": a}) for n, a in calls)


def _llama_tag(content: str, calls: list[Call]) -> str:
    return content + ("<|python_tag|>" if calls else "") + _llama("", calls)


def _plain(content: str, calls: list[Call]) -> str:
    return content + "\n".join(_json({"name": n, "arguments": a}) for n, a in calls)


def _mistral_array(content: str, calls: list[Call]) -> str:
    return content + (
        f"[TOOL_CALLS]{_json([{'name': n, 'arguments': a} for n, a in calls])}" if calls else ""
    )


def _mistral_named(content: str, calls: list[Call]) -> str:
    return content + "".join(f"[TOOL_CALLS]{n}[ARGS]{_json(a)}" for n, a in calls)


def _deepseek(content: str, calls: list[Call]) -> str:
    blocks = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{_json(a)}\n```<｜tool▁call▁end｜>"
        for n, a in calls
    ]
    body = "\n".join(blocks)
    return content + (f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>" if calls else "")


def _deepseek_31(content: str, calls: list[Call]) -> str:
    blocks = [
        f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{_json(a)}<｜tool▁call▁end｜>" for n, a in calls
    ]
    body = "".join(blocks)
    return content + (f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>" if calls else "")


def _granite(content: str, calls: list[Call]) -> str:
    found = _json([{"name": n, "arguments": a} for n, a in calls])
    return content + (f"<|tool_call|>{found}" if calls else "")


def _pythonic(content: str, calls: list[Call]) -> str:
    def call(name: str, arguments: dict[str, Any]) -> str:
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"

    return content + (f"[{', '.join(call(n, a) for n, a in calls)}]" if calls else "")


def _compact(value: Any, quote: str) -> str:
    if isinstance(value, str):
        return f"{quote}{value}{quote}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_compact(v, quote)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_compact(element, quote) for element in value) + "]"
    return _json(value)


def _function_gemma(content: str, calls: list[Call]) -> str:
    return content + "".join(
        f"<start_function_call>call:{n}{_compact(a, '<escape>')}<end_function_call>"
        for n, a in calls
    )


def _gemma_4(content: str, calls: list[Call]) -> str:
    quote = '<|"|>'
    return content + "".join(
        f"<|tool_call>call:{n}{_compact(a, quote)}<tool_call|>" for n, a in calls
    )


def _harmony(content: str, calls: list[Call]) -> str:
    messages = [
        f"<|channel|>commentary to=functions.{n} <|constrain|>json<|message|>{_json(a)}<|call|>"
        for n, a in calls
    ]
    if content:
        messages.insert(0, f"<|channel|>final<|message|>{content}<|end|>")
    return "<|start|>assistant".join(messages)


FAMILIES = {
    "hermes": Family(HermesReader, _hermes),
    "qwen_coder": Family(lambda: QwenCoderReader(TOOLS), _qwen_coder),
    "llama": Family(LlamaJsonReader, _llama, content_with_calls=False),
    "llama_tag": Family(LlamaJsonReader, _llama_tag),
    "plain": Family(PlainJsonReader, _plain, content_with_calls=False),
    "mistral_array": Family(MistralReader, _mistral_array),
    "mistral_named": Family(MistralReader, _mistral_named),
    "deepseek": Family(DeepSeekReader, _deepseek),
    "deepseek_31": Family(DeepSeekReader, _deepseek_31),
    "granite": Family(GraniteReader, _granite),
    "pythonic": Family(PythonicReader, _pythonic, content_with_calls=False),
    "function_gemma": Family(lambda: GemmaReader(FUNCTION_GEMMA), _function_gemma),
    "gemma_4": Family(lambda: GemmaReader(GEMMA_4), _gemma_4),
    "harmony": Family(HarmonyReader, _harmony),
}

CITIES = ("Paris", "Zürich", "東京", 'Say "hi"', "a\\b", "line\nbreak", "{brace}", "C'est", "")
CONTENTS = ("", "Let me look.", "I will check <that> for you: [1], {2}", "Ja, 好 😀.")


def draw_answer(rng: Random, family: Family) -> tuple[str, list[Call]]:
    """Content and calls that the family can write."""
    calls: list[Call] = []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        name = rng.choice(sorted(TOOLS))
        arguments: dict[str, Any] = {}
        if name == "get_weather":
            arguments = {"city": rng.choice(CITIES), "days": rng.randint(-3, 99)}
            if rng.random() < 0.5:
                arguments["exact"] = rng.random() < 0.5
        elif name == "search":
            arguments = {"query": rng.choice(CITIES), "tags": ["a", "b c"][: rng.randint(0, 2)]}
            if rng.random() < 0.5:
                arguments["where"] = {"year": rng.randint(1, 2000), "in": {"place": "x"}}
        calls.append((name, arguments))
    content = rng.choice(CONTENTS)
    if calls and not family.content_with_calls:
        content = ""
    return content, calls
