"""Grammars that hold from the end of free reasoning on."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken

from pla_serve.grammar.compiler import GrammarCompiler
from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.tokenizer import vocabulary_of
from pla_serve.wire.engine import FreeThought, Grammar
from tests.server.server_harness import make_tokenizer

OPEN, CLOSE, EOS = 257, 258, 256
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
GRAMMARS = (
    Grammar("json_schema", SCHEMA),
    Grammar("json_object"),
    Grammar("regex", r"\{\"a\": [/\n1]\}|/\/"),
    Grammar("lark", '%llguidance {}\nstart: "{\\"a\\": 1}" | "start" start // start\n'),
)
TEXT = b'{"a": 1}'
OPENED = FreeThought("</think>", CLOSE)
EITHER = FreeThought("</think>", CLOSE, "<think>", OPEN)
SPELLED = FreeThought("</think>")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokenizer = make_tokenizer(None)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in ("<think>", "</think>")])
    return GrammarCompiler(vocabulary_of(tokenizer, 260, [EOS]))


def takes(compiler: GrammarCompiler, grammar: Grammar, tokens: list[int]) -> bool:
    """Whether the masks let all of ``tokens`` pass, and an end after them."""
    matcher = compiler.start(grammar)
    for token in [*tokens, EOS]:
        mask = matcher.mask()
        if not mask[token // 8] >> token % 8 & 1:
            return False
        if token != EOS:
            assert matcher.advance(token) is None
    return True


def after(grammar: Grammar, thought: FreeThought) -> Grammar:
    return Grammar(grammar.kind, grammar.spec, grammar.optional, thought)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
def test_the_answer_follows_the_reasoning(compiler: GrammarCompiler, grammar: Grammar) -> None:
    opened, either = after(grammar, OPENED), after(grammar, EITHER)
    assert takes(compiler, opened, [*b"hm {", CLOSE, *b"\n\n", *TEXT])
    assert not takes(compiler, opened, [*b"hm", CLOSE, *b"no"])
    assert not takes(compiler, opened, [*TEXT])
    assert takes(compiler, either, [OPEN, *b"hm", CLOSE, *TEXT])
    assert takes(compiler, either, [*TEXT])
    assert not takes(compiler, either, [*b"hm", CLOSE, *TEXT])
    spelled = after(grammar, SPELLED)
    assert takes(compiler, spelled, [*b"hm</think>", *TEXT])
    assert not takes(compiler, spelled, [*b"hm</think>no"])


def test_reasoning_is_closed_at_its_bound(compiler: GrammarCompiler) -> None:
    bounded = after(GRAMMARS[0], FreeThought("</think>", CLOSE, most_tokens=3))
    assert takes(compiler, bounded, [*b"hmm", CLOSE, *TEXT])
    assert not takes(compiler, bounded, [*b"hmmm", CLOSE, *TEXT])
    free = after(Grammar("lark", "start: /(.|\\n)*/\n"), bounded.thought or OPENED)
    assert takes(compiler, free, [*b"hmm", CLOSE, *b"anything\n</think>"])
    assert not takes(compiler, free, [*b"hmmm", CLOSE, *b"anything"])


def test_a_bad_grammar_is_refused_all_the_same(compiler: GrammarCompiler) -> None:
    for bad in (
        Grammar("lark", "start: nothing"),
        Grammar("regex", "("),
        Grammar("json_schema", "["),
    ):
        with pytest.raises(GrammarError):
            compiler.check_grammar(after(bad, OPENED))
