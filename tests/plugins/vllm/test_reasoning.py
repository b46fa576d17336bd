"""Our readers of reasoning against vLLM's own parsers, on generated answers of each family.

White space next to the markers is not compared: vLLM leaves it in the texts, ours drops it.
Where vLLM 0.32 reads otherwise, and why ours stays:

- granite, an answer cut within its reasoning: read whole, vLLM takes it for content, marker and
  all; streamed, for reasoning. Ours is reasoning both ways.
- qwen3, an answer without either marker from a prompt that has neither: vLLM takes all of it for
  reasoning, so that the client gets no content. Ours is content. It is not among the answers here.
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.reasoning import ReasoningParserManager

from pla_serve.server.reasoning.counter import ReasoningCounter
from pla_serve.server.reasoning.formats import BY_NAME, Beginning
from pla_serve.server.reasoning.reader import ReasoningReader
from pla_serve.server.tools.events import read_whole
from tests.server.reasoning.thoughts import FAMILIES, Thought, draw_thought

ANSWERS = 500
MARKERS = ("<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>")
MISTRAL = ("[TOOL_CALLS]", "[ARGS]")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and markers: vLLM's parsers look the markers up."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: place for place, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([*MARKERS, *MISTRAL])
    return PreTrainedTokenizerFast(tokenizer_object=core)


def drawn(name: str) -> list[Thought]:
    thoughts = [draw_thought(Random(seed), BY_NAME[name]) for seed in range(2 * ANSWERS)]
    return [thought for thought in thoughts if is_compared(name, thought)][:ANSWERS]


def is_compared(name: str, thought: Thought) -> bool:
    form = BY_NAME[name]
    if name == "granite":
        return any(marker in thought.text for marker in form.closes) or not thought.reasoning
    if name == "mistral" and thought.beginning is Beginning.REASONING:
        return thought.text.startswith(form.opens)
    return True


def their_parser(name: str, thought: Thought, tokenizer: Any) -> Any:
    kwargs = {}
    if thought.beginning is Beginning.ANSWER:
        kwargs["chat_template_kwargs"] = {"enable_thinking": False, "thinking": False}
        name = {"deepseek_r1": "deepseek_v3"}.get(name, name)
    return ReasoningParserManager.get_reasoning_parser(name)(tokenizer, **kwargs)


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_read_as_vllm_reads_them(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "x"}])
    thoughts = drawn(name)
    assert len(thoughts) == ANSWERS
    for thought in thoughts:
        parser = their_parser(name, thought, tokenizer)
        reasoning, content = parser.extract_reasoning(thought.text, request)
        ours = read_whole(ReasoningReader(BY_NAME[name], thought.beginning), thought.text)
        assert ours.reasoning.strip() == (reasoning or "").strip(), thought
        assert ours.content.strip() == (content or "").strip(), thought


def test_tokens_are_counted_as_vllm_counts_them(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of answers with both markers; without the first one vLLM's counter stays at 0."""
    form = BY_NAME["deepseek_r1"]
    counted = 0
    for seed in range(ANSWERS):
        thought = draw_thought(Random(seed), form)
        if not (thought.text.startswith("<think>") and "</think>" in thought.text):
            continue
        tokens = tokenizer.encode(thought.text, add_special_tokens=False)
        pieces = [tokenizer.decode([token]).encode() for token in tokens]
        ours = ReasoningCounter(form, Beginning.EITHER, pieces.__getitem__)
        ours.push(range(len(tokens)))
        theirs = their_parser("deepseek_r1", thought, tokenizer).count_reasoning_tokens(tokens)
        assert ours.count == theirs, thought
        counted += 1
    assert counted > 100
