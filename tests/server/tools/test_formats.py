"""Readers: the same answer whole, or cut at any place."""

from __future__ import annotations

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.server.tools.events import CallArguments, ReadAnswer, read_whole
from pla_serve.server.tools.formats.pythonic import CallEnd
from tests.server.tools.answers import FAMILIES, Call, draw_answer


def calls_of(answer: ReadAnswer) -> list[Call]:
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


class CountingCallEnd(CallEnd):
    looked_at = 0

    def _closes(self, char: str) -> bool:
        self.looked_at += 1
        return super()._closes(char)


def test_a_long_call_is_looked_at_once() -> None:
    text, finder = f"f(a={'x' * 500})", CountingCallEnd()
    found = [finder.find(text[:length]) for length in range(1, len(text) + 1)]
    assert found == [None] * (len(text) - 1) + [len(text)]
    assert finder.looked_at == len(text)


@pytest.mark.parametrize("name", FAMILIES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_what_a_family_writes_is_read(name: str, seed: int) -> None:
    family = FAMILIES[name]
    content, calls = draw_answer(Random(seed), family)
    answer = read_whole(family.reader(), family.write(content, calls))
    assert calls_of(answer) == calls
    assert answer.content.rstrip() == content


@pytest.mark.parametrize("name", FAMILIES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_an_answer_cut_in_two_is_the_same(name: str, seed: int) -> None:
    family = FAMILIES[name]
    text = family.write(*draw_answer(Random(seed), family))
    whole = read_whole(family.reader(), text)
    for cut in range(len(text) + 1):
        reader, found = family.reader(), ReadAnswer()
        for piece in (text[:cut], text[cut:]):
            found.add(reader.push(piece))
        found.add(reader.finish())
        assert found == whole, f"cut at {cut} of {text!r}"


@pytest.mark.parametrize("name", FAMILIES)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_an_answer_by_characters_and_cut_short(name: str, seed: int, cut: int) -> None:
    """An answer that ran out of tokens is read the same whole and by characters."""
    family = FAMILIES[name]
    text = family.write(*draw_answer(Random(seed), family))[:cut]
    reader, found = family.reader(), ReadAnswer()
    for char in text:
        found.add(reader.push(char))
    found.add(reader.finish())
    assert found == read_whole(family.reader(), text)


@pytest.mark.parametrize("name", FAMILIES)
@given(text=st.text(st.sampled_from('<|>_tol/cal{}[]()":,=\n aé1'), max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_text_makes_a_reader_fail(name: str, text: str) -> None:
    reader, found = FAMILIES[name].reader(), ReadAnswer()
    for char in text:
        found.add(reader.push(char))
    found.add(reader.finish())
    assert found == read_whole(FAMILIES[name].reader(), text)


@pytest.mark.parametrize("name", ["hermes", "mistral_named", "deepseek_31", "llama", "harmony"])
def test_arguments_are_streamed_as_they_come(name: str) -> None:
    family = FAMILIES[name]
    text = family.write("", [("search", {"query": "x" * 100})])
    reader = family.reader()
    events = [event for char in text for event in reader.push(char)]
    assert len([event for event in events if isinstance(event, CallArguments)]) > 100


def test_text_that_only_looks_like_a_call_is_content() -> None:
    for name, text in {
        "hermes": "Use <tool_cal and <tool>.",
        "llama": '{"city": "Paris"}',
        "pythonic": "[1, 2, 3] is a list",
        "plain": '{"a":[1,  {"b": 2}] ,"c":3}',
    }.items():
        answer = read_whole(FAMILIES[name].reader(), text)
        assert not answer.calls
        assert answer.content == text


def test_reasoning_and_calls_of_harmony() -> None:
    text = (
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>"
        'commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>'
    )
    answer = read_whole(FAMILIES["harmony"].reader(), text)
    assert (answer.reasoning, answer.content) == ("Need the weather.", "")
    assert calls_of(answer) == [("get_weather", {"city": "Paris"})]
