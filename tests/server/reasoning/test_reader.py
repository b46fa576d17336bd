"""Reasoning out of answers: whole, in pieces, and counted."""

from __future__ import annotations

from random import Random

import pytest

from pla_serve.server.reasoning.counter import ReasoningCounter
from pla_serve.server.reasoning.formats import (
    BY_NAME,
    FORMATS,
    Beginning,
    ReasoningFormat,
    choose_reasoning,
)
from pla_serve.server.reasoning.reader import ReasoningReader
from pla_serve.server.tools.events import AnswerReader, ReadAnswer, ReadCall, read_whole
from pla_serve.server.tools.formats.harmony import HarmonyReader
from pla_serve.server.tools.formats.hermes import HermesReader
from tests.server.reasoning.thoughts import draw_thought, forms

QWEN = BY_NAME["qwen3"]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def read_in_pieces(reader: AnswerReader, pieces: list[str]) -> ReadAnswer:
    answer = ReadAnswer()
    for piece in pieces:
        answer.add(reader.push(piece))
    answer.add(reader.finish())
    return answer


@pytest.mark.parametrize("form", forms(), ids=lambda form: form.name)
def test_answers_are_read_as_they_were_written(form: ReasoningFormat) -> None:
    for seed in range(200):
        thought = draw_thought(Random(seed), form)
        answer = read_whole(ReasoningReader(form, thought.beginning), thought.text)
        assert answer.reasoning.strip() == thought.reasoning, thought
        assert answer.content.strip() == thought.content.strip(), thought


@pytest.mark.parametrize("form", forms(), ids=lambda form: form.name)
def test_cut_anywhere_it_reads_the_same(form: ReasoningFormat) -> None:
    for seed in range(60):
        thought = draw_thought(Random(seed), form)
        whole = read_whole(ReasoningReader(form, thought.beginning), thought.text)
        cuts = [[thought.text[:at], thought.text[at:]] for at in range(len(thought.text) + 1)]
        for pieces in [*cuts, list(thought.text)]:
            found = read_in_pieces(ReasoningReader(form, thought.beginning), pieces)
            assert found == whole, pieces


@pytest.mark.parametrize("form", forms(), ids=lambda form: form.name)
def test_tokens_are_counted_however_they_come(form: ReasoningFormat) -> None:
    """A token is a byte here, or one of the markers."""
    for seed in range(100):
        thought = draw_thought(Random(seed), form)
        raw = thought.text.encode()
        pieces = [raw[at : at + 1] for at in range(len(raw))]
        one_by_one = ReasoningCounter(form, thought.beginning, pieces.__getitem__)
        for token in range(len(pieces)):
            one_by_one.push([token])
        at_once = ReasoningCounter(form, thought.beginning, pieces.__getitem__)
        at_once.push(range(len(pieces)))
        read = read_whole(ReasoningReader(form, thought.beginning), thought.text).reasoning
        assert one_by_one.count == at_once.count
        if thought.beginning is Beginning.ANSWER:
            assert at_once.count == 0
        elif thought.text.startswith(form.opens) == (thought.beginning is Beginning.EITHER):
            around = at_once.count - len(read.encode())
            assert 0 <= around <= 2, (thought, at_once.count)


def test_markers_do_not_count() -> None:
    pieces = [b"<think>", b"a", b" b", b"</think>", b"c"]
    counter = ReasoningCounter(QWEN, Beginning.EITHER, pieces.__getitem__)
    counter.push(range(5))
    assert counter.count == 2


def test_without_the_opening_marker_an_answer_is_text() -> None:
    answer = read_whole(ReasoningReader(QWEN, Beginning.EITHER), " \nYes. <think> is a tag")
    assert answer == ReadAnswer(" \nYes. <think> is a tag")


def test_a_marker_that_the_prompt_has_may_come_again() -> None:
    answer = read_whole(ReasoningReader(QWEN, Beginning.REASONING), "<think>\na</think>\n\nb")
    assert answer == ReadAnswer("b", "a")


def test_indented_text_after_the_reasoning_keeps_its_indentation() -> None:
    answer = read_whole(ReasoningReader(QWEN, Beginning.REASONING), "a\n</think>\n\n    x = 1\n")
    assert answer == ReadAnswer("    x = 1\n", "a")


def test_reasoning_and_calls() -> None:
    reader = ReasoningReader(QWEN, Beginning.EITHER, HermesReader(), QWEN.calls)
    answer = read_whole(reader, f"<think>\nhm\n</think>\n\nI look.\n{CALL}")
    assert answer == ReadAnswer("I look.", "hm", [ReadCall("f", '{"a": 1}')])


def test_a_call_ends_the_reasoning() -> None:
    for pieces in ([f"<think>hm\n{CALL}"], list(f"<think>hm\n{CALL}")):
        reader = ReasoningReader(QWEN, Beginning.EITHER, HermesReader(), QWEN.calls)
        assert read_in_pieces(reader, pieces) == ReadAnswer("", "hm", [ReadCall("f", '{"a": 1}')])


def test_where_calls_are_not_read_their_marker_is_reasoning() -> None:
    answer = read_whole(ReasoningReader(QWEN, Beginning.EITHER), "<think>a <tool_call> b</think>c")
    assert answer == ReadAnswer("c", "a <tool_call> b")


def test_mistral_reasons_between_texts() -> None:
    reader = ReasoningReader(BY_NAME["mistral"], Beginning.EITHER)
    answer = read_whole(reader, "One. [THINK]a[/THINK]Two. [THINK]b[/THINK]Three.")
    assert answer == ReadAnswer("One. Two. Three.", "ab")


def test_harmony_without_calls() -> None:
    text = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary "
        "to=functions.f<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>Yes"
    )
    assert read_whole(HarmonyReader(calls=False), text) == ReadAnswer("{}Yes", "hm")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<|channel|>analysis<|message|>", "harmony"),
        ("[THINK] [TOOL_CALLS]", "mistral"),
        ("Write your thoughts after 'Here is my thought process:' and", "granite"),
        ("<｜Assistant｜><think>\n</think>", "deepseek_r1"),
        ("{{ content.split('</think>')[-1] }}", "qwen3"),
        ("{{ messages }}", "none"),
    ],
)
def test_the_template_tells_the_format(template: str, name: str) -> None:
    assert choose_reasoning(template).name == name


def test_names() -> None:
    assert [choose_reasoning("", known.name) for known in FORMATS] == list(FORMATS)
    assert choose_reasoning("", "openai_gptoss").name == "harmony"
    with pytest.raises(ValueError, match="qwen3"):
        choose_reasoning("", "nonsense")


def test_white_space_before_an_answer_is_not_gathered() -> None:
    """To look through all of it for every token held the event loop for seconds."""
    counter = ReasoningCounter(QWEN, Beginning.EITHER, [b" ", b"<think>", b"x"].__getitem__)
    counter.push([0] * 1_000)
    assert not counter._tail
    counter.push([1, 2, 2])
    assert counter.count == 2
