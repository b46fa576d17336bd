"""What a model's vocabulary and template say of its reasoning."""

from __future__ import annotations

import pytest

from pla_serve.server.reasoning.effort import effort_variables
from pla_serve.server.reasoning.formats import Beginning
from pla_serve.server.reasoning.support import ReasoningSupport, check_together
from pla_serve.wire.engine import FreeThought
from tests.server.server_harness import make_tokenizer

SPECIAL = ("<think>", "</think>")
HARMONY = "<|channel|>analysis<|message|>{{ reasoning_effort }}{{ message.thinking }}"


def support(name: str, special: tuple[str, ...] = SPECIAL) -> ReasoningSupport:
    return ReasoningSupport(make_tokenizer(None, special), "", name)


@pytest.mark.parametrize(
    ("name", "prompt", "beginning"),
    [
        ("qwen3", "<|im_start|>assistant\n", Beginning.EITHER),
        ("qwen3", "<|im_start|>assistant\n<think>\n", Beginning.REASONING),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n", Beginning.ANSWER),
        ("deepseek_r1", "<Assistant>", Beginning.REASONING),
        ("deepseek_r1", "<Assistant></think>", Beginning.ANSWER),
    ],
)
def test_the_prompt_tells_how_an_answer_begins(
    name: str, prompt: str, beginning: Beginning
) -> None:
    assert support(name).beginning(prompt) is beginning


def test_reasoning_before_a_grammar() -> None:
    qwen = support("qwen3")
    opening, closing = (make_tokenizer(None, SPECIAL).convert_tokens_to_ids(s) for s in SPECIAL)
    assert qwen.thought(Beginning.ANSWER) is None
    assert qwen.thought(Beginning.REASONING, 9) == FreeThought("</think>", closing, most_tokens=9)
    whole = FreeThought("</think>", closing, "<think>", opening)
    assert qwen.thought(Beginning.EITHER) == whole
    assert support("none").thought(Beginning.EITHER) is None


def test_markers_that_are_no_tokens_are_looked_for_as_text() -> None:
    qwen = support("qwen3", ())
    assert not qwen.bounds
    assert qwen.thought(Beginning.REASONING, 9) == FreeThought("</think>")


def test_effort() -> None:
    assert effort_variables(HARMONY, "max") == {"reasoning_effort": "high"}
    assert effort_variables("{% if thinking %}", "low") == {"thinking": True}
    assert effort_variables("{% if enable_thinking %}", "none") == {"enable_thinking": False}
    assert effort_variables("{% if enable_thinking %}", None) == {}
    assert effort_variables("{{ messages }}", "high") == {}


def test_harmony_holds_reasoning_and_calls() -> None:
    harmony = support("harmony")
    check_together(harmony, "harmony")
    check_together(support("qwen3"), "hermes")
    with pytest.raises(ValueError, match="--tool-parser harmony"):
        check_together(harmony, "hermes")
