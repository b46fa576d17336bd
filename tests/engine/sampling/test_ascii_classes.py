r"""``\d``, ``\w`` and ``\s`` are ASCII wherever a client may write them."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pla_serve.grammar.ascii_classes import with_ascii_classes
from pla_serve.grammar.compiler import GrammarCompiler
from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.structure import with_ascii_terminals
from pla_serve.grammar.tokenizer import vocabulary_of
from pla_serve.server.generation.detokenize import _byte_spelling
from pla_serve.wire.engine import Grammar

TEXTS = [
    "7",
    "x",
    "_",
    " ",
    "\n",
    "-",
    "\u0663",
    "\U0001d7d8",
    "\u00e9",
    "\u00a0",
    "\u2003",
    "\u4e16",
]
"""ASCII ones, and digits, letters and spaces of other scripts."""


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """For a vocabulary of bytes."""
    core = Tokenizer(models.BPE(vocab=dict(_byte_spelling()), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    return GrammarCompiler(vocabulary_of(tokenizer, 257))


def allows(compiler: GrammarCompiler, grammar: Grammar, text: str) -> bool:
    matcher = compiler.start(grammar)
    for byte in text.encode():
        if not matcher.mask()[byte // 8] >> byte % 8 & 1:
            return False
        matcher.advance(byte)
    return matcher.finished or bool(matcher.mask()[256 // 8] & 1)


CLASSES = [
    r"\d",
    r"\w",
    r"\s",
    r"\D",
    r"\W",
    r"\S",
    r"[\d]",
    r"[^\d]",
    r"[\w-]",
    r"[^\W]",
    r"[\s\S]",
]


@pytest.mark.parametrize("regex", CLASSES)
def test_regular_expressions(compiler: GrammarCompiler, regex: str) -> None:
    for text in TEXTS:
        right = re.fullmatch(regex, text, re.ASCII) is not None
        assert allows(compiler, Grammar("regex", regex), text) == right, (text, right)


@pytest.mark.parametrize("regex", [r"\d", r"\w", r"[\d]", r"[^\W]"])
def test_everywhere_the_same(compiler: GrammarCompiler, regex: str) -> None:
    """Also in Lark's terminals, in JSON inside of Lark, and in the patterns of schemas."""
    schema = {"type": "string", "pattern": f"^{regex}$"}
    grammars = {
        "": [
            Grammar("regex", regex),
            Grammar("lark", f"start: /{regex}/"),
            Grammar("lark", f"start: A\nA: /{regex}/"),
        ],
        '"': [
            Grammar("json_schema", json.dumps(schema)),
            Grammar("lark", f"start: %json {json.dumps(schema)}"),
        ],
    }
    for quote, several in grammars.items():
        for grammar in several:
            for text in TEXTS:
                if text.isprintable():
                    right = re.fullmatch(regex, text, re.ASCII) is not None
                    got = allows(compiler, grammar, quote + text + quote)
                    assert got == right, (grammar, text)


@pytest.mark.parametrize(
    ("regex", "right"),
    [
        (r"\\d", r"\\d"),
        (r"\\\d", r"\\[0-9]"),
        (r"[]\d]\d", r"[]0-9][0-9]"),
        (r"[^]\w]\]\w", r"[^]A-Za-z0-9_]\][A-Za-z0-9_]"),
        (r"[\]\d]\d", r"[\]0-9][0-9]"),
        (r"[[:alpha:]\d]\d", r"[[:alpha:]0-9][0-9]"),
        (r"\p{N}\x{41}\n.", r"\p{N}\x{41}\n."),
        (r"(?P<year>\d{4})", r"(?P<year>[0-9]{4})"),
        ("", ""),
        ("\\", "\\"),
    ],
)
def test_what_is_rewritten(regex: str, right: str) -> None:
    assert with_ascii_classes(regex) == right


def test_strings_and_comments_of_lark_stay() -> None:
    grammar = 'start: "/\\d/" A // \\d /\nA: /a\\/\\d/i\nB: %json {"pattern": "\\\\d"}'
    right = grammar.replace("A: /a\\/\\d/i", "A: /a\\/[0-9]/i")
    assert with_ascii_terminals(grammar) == right


def test_word_boundaries_are_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="lookaround"):
        compiler.start(Grammar("regex", r"\bfoo\b"))
