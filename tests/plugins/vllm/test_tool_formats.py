"""Our readers of tool calls against vLLM's own parsers, on generated answers of each family.

Families where vLLM 0.32 reads otherwise, and why ours stays:

- llama with text before the tag: vLLM takes a brace in that text for a call and gives up.
- Mistral's array of calls: vLLM reads it only with Mistral's own tokenizer of an old version.
- FunctionGemma: vLLM drops arguments that are no text (numbers, booleans, lists).
- Gemma 4: vLLM turns numbers inside objects without a schema into text.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tool_parsers import ToolParserManager

from pla_serve.server.tools.choice import FORMATS
from pla_serve.server.tools.events import read_whole
from tests.server.tools.answers import FAMILIES, TOOLS, draw_answer

ANSWERS = 500
THEIRS = {
    "hermes": "hermes",
    "qwen_coder": "qwen3_coder",
    "llama": "llama3_json",
    "mistral_named": "mistral",
    "deepseek": "deepseek_v3",
    "deepseek_31": "deepseek_v31",
    "granite": "granite",
    "pythonic": "pythonic",
}
"""Families that vLLM reads, by the name of its parser."""
MARKERS = {marker for known in FORMATS for marker in known.markers}
THINKING = ("<think>", "</think>", "[THINK]", "[/THINK]")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and markers: vLLM's parsers look the markers up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: place for place, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([*sorted(MARKERS), *THINKING])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def request() -> ChatCompletionRequest:
    tools = [
        {"type": "function", "function": {"name": tool.name, "parameters": tool.parameters}}
        for tool in TOOLS.values()
    ]
    messages = [{"role": "user", "content": "x"}]
    return ChatCompletionRequest(model="m", messages=messages, tools=tools, tool_choice="auto")


@pytest.mark.parametrize("name", THEIRS)
def test_answers_are_read_as_vllm_reads_them(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    asked, family = request(), FAMILIES[name]
    for seed in range(ANSWERS):
        content, calls = draw_answer(Random(seed), family)
        text = family.write(content, calls)
        theirs: Any = ToolParserManager.get_tool_parser(THEIRS[name])(tokenizer, asked.tools)
        found = theirs.extract_tool_calls(text, asked)
        expected = [(c.function.name, json.loads(c.function.arguments)) for c in found.tool_calls]
        answer = read_whole(family.reader(), text)
        ours = [(call.name, json.loads(call.arguments)) for call in answer.calls]
        assert ours == expected, text
        assert answer.content.strip() == (found.content or "").strip(), text
