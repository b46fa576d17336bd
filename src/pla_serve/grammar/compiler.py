"""Output that is text of a given grammar, by llguidance. Runs in workers: see the package.

A compiled grammar says before each token which tokens may follow. Costs, measured with a 49k
vocabulary: a plain schema compiles in about 1 ms, one of 500 properties in 50 ms; a mask takes
0.05 ms, 10 ms at worst for sane schemas.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import llguidance

from pla_serve.grammar.ascii_classes import with_ascii_classes
from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.limits import ALLOWANCE_SECONDS, TOKEN_SECONDS, GrammarLimits
from pla_serve.grammar.structure import check_structure, with_ascii_terminals
from pla_serve.grammar.thought import WHITESPACE, after_thought
from pla_serve.grammar.tokenizer import GrammarVocabulary
from pla_serve.wire.engine import Grammar

LIMITS = llguidance.LLParserLimits(
    max_grammar_size=50_000, step_max_items=15_000, max_lexer_states=50_000, verbose_errors=False
)
"""Tighter than llguidance's own. They bound most masks to some 10 ms, but not all of them."""
RENEWALS = 2
"""Times that one text may move to a freshly compiled grammar because the states of the old one are
used up."""


@dataclass(frozen=True, slots=True, eq=False)
class CompiledGrammar:
    """Initial matcher, of which each sequence gets a copy, and the CPU seconds of compiling it.

    Copies share the grammar states that any of them has computed, so later masks are cheaper. The
    number of states is limited for all copies together. When it is reached, the grammar is compiled
    anew (`GrammarCompiler.discard`).
    """

    matcher: Any
    seconds: float


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps the most recently used ones.

    Args:
        cache_size: compiled grammars kept.
        clock: CPU seconds of the calling thread; other load on the machine must not count.
    """

    def __init__(
        self,
        vocabulary: GrammarVocabulary,
        *,
        limits: GrammarLimits | None = None,
        cache_size: int = 64,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.eos_token_ids = vocabulary.eos_token_ids
        self._tokenizer = llguidance.LLTokenizer(
            vocabulary.tokenizer_json,
            n_vocab=vocabulary.size,
            eos_token=sorted(self.eos_token_ids),
        )
        self._limits = limits or GrammarLimits()
        self.clock = clock
        self.mask_bytes = 4 * ((self._tokenizer.vocab_size + 31) // 32)
        self.eos_mask = _mask_of(self.eos_token_ids, self.mask_bytes)
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._cache_size = cache_size

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile a grammar and compute its first mask.

        Raises:
            GrammarError: what is wrong, for the client.
        """
        self.start(grammar).first_mask()
        seconds = self.compiled(grammar).seconds
        most = self._limits.compile_seconds
        if seconds > most:
            raise GrammarError(
                f"the grammar takes {seconds:.1f} s to compile, more than {most} s; "
                "simplify it, for example by fewer alternatives"
            )

    def start(self, grammar: Grammar) -> GrammarMatcher:
        """Return a matcher at the start of a text.

        Raises:
            GrammarError: what is wrong, for the client.
        """
        return GrammarMatcher(self, grammar)

    def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """Return the compiled grammar, from the cache if it is there.

        Raises:
            GrammarError: what is wrong, for the client.
        """
        known = self._cache.get(grammar)
        if known is None:
            known = self._cache[grammar] = self._compile(grammar)
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        self._cache.move_to_end(grammar)
        return known

    def discard(self, grammar: Grammar, used_up: CompiledGrammar) -> None:
        """Drop a compiled grammar that is used up, so that it is compiled anew when needed."""
        if self._cache.get(grammar) is used_up:
            del self._cache[grammar]

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        begin = self.clock()
        check_structure(grammar, self._limits)
        text = _to_llguidance(grammar)
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(f"bad {grammar.kind} grammar: {_first_lines(matcher.get_error())}")
        return CompiledGrammar(matcher, self.clock() - begin)


class GrammarMatcher:
    """One sequence's place in its grammar.

    Attributes:
        error: why it cannot go on, for the client; None while it can.
        finished: the last token completed the text, and nothing can be added.
        must_stop: as ``finished``, or the mask allows nothing but an end.

    Raises:
        GrammarError: the grammar is bad.
    """

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar) -> None:
        self.error: str | None = None
        self.finished = False
        self.must_stop = False
        self._compiler = compiler
        self._grammar = grammar
        self._compiled = compiler.compiled(grammar)
        self._matcher = self._compiled.matcher.deep_copy()
        self._tokens: list[int] = []
        self._renewals = 0
        self._seconds_left = ALLOWANCE_SECONDS

    def first_mask(self) -> bytes:
        """The mask of the first token.

        Raises:
            GrammarError: no text can begin.
        """
        mask = self.mask()
        if self.error is not None:
            raise GrammarError(f"no token can begin a text of this grammar: {self.error}")
        if not int.from_bytes(mask, "little"):
            raise GrammarError("no token can begin a text of this grammar")
        return mask

    def mask(self) -> bytes:
        """Compute the mask of the next token: bit ``i % 8`` of byte ``i // 8`` allows token i.

        After an error no token is allowed.
        """
        compiler = self._compiler
        begin = compiler.clock()
        mask: bytes = self._matcher.compute_bitmask()
        while self._matcher.is_error() and self._renew():
            mask = self._matcher.compute_bitmask()
        self._after_step(compiler.clock() - begin)
        if self.error is not None:
            return bytes(compiler.mask_bytes)
        if self._matcher.is_accepting():
            self.must_stop = not int.from_bytes(mask, "little") & ~compiler.eos_mask
        return mask

    def advance(self, token: int) -> str | None:
        """Append ``token``, which the mask allowed and which is not EOS. Returns ``error``."""
        begin = self._compiler.clock()
        self._tokens.append(token)
        self._matcher.consume_token(token)
        while self._matcher.is_error() and self._renew():
            pass
        self._after_step(self._compiler.clock() - begin - TOKEN_SECONDS)
        self.finished = self.must_stop = self.error is None and bool(self._matcher.is_stopped())
        return self.error

    def _renew(self) -> bool:
        """Replay the text on a freshly compiled grammar; False after RENEWALS of these."""
        if self.error is not None or self._renewals == RENEWALS:
            return False
        self._renewals += 1
        self._compiler.discard(self._grammar, self._compiled)
        self._compiled = self._compiler.compiled(self._grammar)
        self._matcher = self._compiled.matcher.deep_copy()
        self._matcher.consume_tokens(self._tokens)
        return True

    def _after_step(self, seconds: float) -> None:
        self._seconds_left = min(self._seconds_left - seconds, ALLOWANCE_SECONDS)
        if self.error is not None:
            return
        if self._matcher.is_error():
            cause = _first_lines(self._matcher.get_error())
            self.error = f"the grammar became too complex or contradicts itself: {cause}"
        elif self._seconds_left < 0:
            self.error = (
                "the grammar is too ambiguous: it takes more than "
                f"{1000 * TOKEN_SECONDS:.0f} ms a token to follow; simplify it"
            )


def _mask_of(tokens: Collection[int], size: int) -> int:
    bits = bytearray(size)
    for token in tokens:
        bits[token // 8] |= 1 << token % 8
    return int.from_bytes(bits, "little")


def _to_llguidance(grammar: Grammar) -> str:
    spec = grammar.spec
    make = llguidance.LLMatcher
    options: Any = {"whitespace_pattern": WHITESPACE}
    text: str
    if grammar.thought is not None:
        if grammar.kind == "json_schema":
            _checked_json(spec)
        return str(make.grammar_from_lark(after_thought(grammar)))
    match grammar.kind:
        case "json_object":
            text = make.grammar_from_json_schema('{"type": "object"}', defaults=options)
        case "json_schema":
            text = make.grammar_from_json_schema(_checked_json(spec), defaults=options)
        case "regex":
            text = make.grammar_from_regex(with_ascii_classes(spec))
        case "lark":
            text = make.grammar_from_lark(with_ascii_terminals(spec))
    return text


def _checked_json(spec: str) -> str:
    try:
        schema = json.loads(spec)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise GrammarError("the schema must be a JSON object")
    try:
        return json.dumps(schema, allow_nan=False)
    except ValueError:
        raise GrammarError("the schema holds NaN or an infinite number") from None


def _first_lines(message: str) -> str:
    """Return an error message without backtraces, at most 500 characters."""
    kept = message.split("\n<", 1)[0].strip()
    if kept.startswith("panic:"):
        kept = "it is larger than the compiler can hold"
    return kept[:500]
