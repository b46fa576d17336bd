"""Grammars of the formats: what each family writes fits, and what could not be read does not."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import llguidance.hf
import pytest
from llguidance import LLMatcher

from pla_serve.server.tools.choice import BY_NAME
from pla_serve.server.tools.events import read_whole
from pla_serve.server.tools.support import ToolSupport
from pla_serve.server.tools.tool import Tool, ToolUse
from tests.server.server_harness import make_tokenizer
from tests.server.tools.answers import FAMILIES, TOOLS, Call, draw_answer

USE = ToolUse(TOOLS, may_call=tuple(TOOLS))
MUST = replace(USE, must_call=True)
GEMMA = ("gemma4", "function_gemma")
CASES = [
    ("harmony", "harmony", "", True),
    ("deepseek", "deepseek", "```json", False),
    ("deepseek", "deepseek", "```json", True),
    ("deepseek", "deepseek_31", "", True),
    ("mistral", "mistral_array", "", False),
    ("mistral", "mistral_named", "", True),
    ("qwen3_coder", "qwen_coder", "", False),
    ("granite", "granite", "<|tool_call|>", True),
    ("hermes", "hermes", "", False),
    ("hermes", "hermes", "", True),
    ("llama3_json", "llama", "", False),
    ("plain_json", "plain", "", False),
]
"""Format, family that writes it, what its template shows, and whether markers are special."""


class Trial:
    """The grammars of one format, with a vocabulary of bytes and its markers."""

    def __init__(self, name: str, template: str = "", special: bool = False) -> None:
        self.tokenizer = make_tokenizer(special=BY_NAME[name].markers if special else ())
        self.support = ToolSupport(self.tokenizer, f"tools {template}", name)
        self._vocabulary = llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=300)

    def fits(self, grammar: str | None, text: str) -> bool:
        """Whether ``text`` is a whole answer by ``grammar``."""
        assert grammar is not None
        matcher = LLMatcher(self._vocabulary, LLMatcher.grammar_from_lark(grammar), log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return all(map(matcher.consume_token, tokens)) and bool(matcher.is_accepting())


@pytest.mark.parametrize(("name", "family", "template", "special"), CASES)
def test_what_a_family_writes_fits(name: str, family: str, template: str, special: bool) -> None:
    trial, writes = Trial(name, template, special), FAMILIES[family]
    free, must = trial.support.grammar(USE), trial.support.grammar(MUST)
    for seed in range(12):
        content, calls = draw_answer(Random(seed), writes)
        if name == "harmony":  # one call an answer, whose end is the EOS token
            content, calls = ("", calls[:1]) if calls else (content or "Hm.", [])
        text = writes.write(content, calls)
        if name == "harmony":
            text = text.removesuffix("<|call|>").removesuffix("<|end|>")
        assert trial.fits(free, text), text
        if calls and not content:
            assert trial.fits(must, text), text
        elif not calls:
            assert not trial.fits(must, text), text


def call_text(name: str, calls: list[Call]) -> str:
    family = {"qwen3_coder": "qwen_coder", "mistral": "mistral_array"}.get(name, name)
    return FAMILIES[{"llama3_json": "llama", "plain_json": "plain"}.get(family, family)].write(
        "", calls
    )


@pytest.mark.parametrize("name", ["hermes", "mistral", "qwen3_coder", "llama3_json", "plain_json"])
def test_what_does_not_fit(name: str) -> None:
    trial = Trial(name)
    paris: Call = ("get_weather", {"city": "Paris"})
    unknown, wrong = call_text(name, [("nobody", {})]), ("get_weather", {"days": "many"})
    for grammar in (trial.support.grammar(USE), trial.support.grammar(MUST)):
        assert trial.fits(grammar, call_text(name, [paris]))
        assert not trial.fits(grammar, unknown)
        assert not trial.fits(grammar, call_text(name, [wrong]))
        assert not trial.fits(grammar, call_text(name, [paris])[:-3])
    named = replace(MUST, may_call=("now",))
    assert trial.fits(trial.support.grammar(named), call_text(name, [("now", {})]))
    assert not trial.fits(trial.support.grammar(named), call_text(name, [paris]))
    for use in (USE, MUST):
        one = trial.support.grammar(replace(use, parallel=False))
        assert trial.fits(one, call_text(name, [paris]))
        assert not trial.fits(one, call_text(name, [paris, paris]))


@pytest.mark.parametrize("name", ["gemma4", "function_gemma"])
def test_gemma_is_free_or_held_to_plain_json(name: str) -> None:
    trial = Trial(name)
    assert trial.support.grammar(USE) is None
    text = FAMILIES["plain"].write("", [("now", {})])
    assert trial.fits(trial.support.grammar(MUST), text)
    assert read_whole(trial.support.reader(MUST)(), text).calls[0].name == "now"


def test_pythonic_is_held_where_a_call_is_required() -> None:
    trial = Trial("pythonic")
    assert trial.support.grammar(USE) is None
    must = trial.support.grammar(MUST)
    text = '[get_weather(city="Paris", exact=true), now()]'
    assert trial.fits(must, text)
    assert not trial.fits(must, '[get_weather("Paris")]')
    calls = read_whole(trial.support.reader(MUST)(), text).calls
    assert calls[0].arguments == '{"city": "Paris", "exact": true}'


def test_definitions_are_found_and_strict_arguments_fit() -> None:
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Place"}},
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {"Place": {"enum": ["here", "there"]}},
    }
    tools = {"go": Tool("go", "", parameters, strict=True)}
    use = ToolUse(tools, must_call=True, may_call=("go",))
    for name in ("hermes", "pythonic", "qwen3_coder"):
        grammar = Trial(name).support.grammar(use)
        write = {"pythonic": "[go(at={})]"}.get(
            name, '<tool_call>\n{{"name": "go", "arguments": {{"at": {}}}}}\n</tool_call>'
        )
        if name == "qwen3_coder":
            write = (
                "<tool_call>\n<function=go>\n<parameter=at>\n{}\n</parameter>\n"
                "</function>\n</tool_call>"
            )
        assert Trial(name).fits(grammar, write.format('"here"'))
        assert not Trial(name).fits(grammar, write.format('"home"'))


def test_an_answer_in_json_beside_tools() -> None:
    answer = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    trial = Trial("hermes")
    grammar = trial.support.grammar(USE, answer)
    assert trial.fits(grammar, '{"a": 1}')
    assert trial.fits(grammar, call_text("hermes", [("now", {})]))
    assert not trial.fits(grammar, "text")
    with pytest.raises(ValueError, match="response_format"):
        Trial("plain_json").support.grammar(USE, answer)
