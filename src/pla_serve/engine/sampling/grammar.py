"""Output that is text of a given grammar, by llguidance.

A compiled grammar says before each token which tokens may follow. Costs, measured with a 49k
vocabulary: a plain schema compiles in about 1 ms, one of 500 properties in 50 ms; a mask takes
0.05 ms, 10 ms at worst for sane schemas. Hostile ones end at the limits below.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import llguidance
import llguidance.hf
import llguidance.numpy
import numpy as np
import torch
from numpy.typing import NDArray

from pla_serve.engine.sampling.errors import GrammarError
from pla_serve.wire.engine import Grammar

MAX_SPEC_CHARACTERS = 256 * 1024
MAX_COMPILE_SECONDS = 1.0
"""CPU time of a compilation beyond which ``check_grammar`` refuses a grammar."""
STEP_ALLOWANCE_SECONDS = 0.5
STEP_SECONDS_A_TOKEN = 0.01
"""CPU time that one text may take for its masks: the allowance, and this for each token."""
LIMITS = llguidance.LLParserLimits(
    max_grammar_size=50_000, step_max_items=15_000, verbose_errors=False
)
"""Tighter than llguidance's own where a hostile grammar could hold up the whole batch."""
RENEWALS = 2
"""How often a text may leave a compiled grammar that is full for a fresh one."""
WHITESPACE = r"[ \n\t\r]{0,64}"
"""Between the parts of JSON. Bounded, or a small model can write blanks until its last token."""


@dataclass(frozen=True, slots=True, eq=False)
class CompiledGrammar:
    """A matcher at its start, to be copied, and the CPU seconds it took to make.

    Copies share what they learn of the grammar's states, which is what makes later masks cheap. But
    states are limited in number, so one compiled grammar can be used up by its copies together.
    """

    matcher: Any
    seconds: float


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the most recently used ones.

    Args:
        tokenizer: a fast ``transformers`` tokenizer.
        vocab_size: the width of the model's logits; ids that the tokenizer lacks are never allowed.
        eos_token_ids: the model's, beside the tokenizer's own.
        cache_size: compiled grammars kept.
        clock: CPU seconds of the calling thread; other load on the machine must not count.

    Raises:
        ValueError: the tokenizer is not a fast one or has no EOS token.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocab_size: int,
        *,
        eos_token_ids: Collection[int] = (),
        cache_size: int = 64,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.eos_token_ids = frozenset(own) | frozenset(eos_token_ids)
        if not self.eos_token_ids:
            raise ValueError("grammars need an EOS token, and neither model nor tokenizer has one")
        self._tokenizer = llguidance.hf.from_tokenizer(
            tokenizer,
            n_vocab=max(vocab_size, len(tokenizer)),
            eos_token=sorted(self.eos_token_ids),
        )
        self.clock = clock
        self.eos_bits = _bits_of(self.eos_token_ids, self._tokenizer.vocab_size)
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._cache_size = cache_size
        self._lock = Lock()

    def check_grammar(self, grammar: Grammar) -> None:
        """Compile it, so that a request with a bad grammar is refused before it costs anything.

        Runs without the GIL: call it in a thread.

        Raises:
            GrammarError: what is wrong, for the client.
        """
        seconds = self.compiled(grammar).seconds
        if seconds > MAX_COMPILE_SECONDS:
            raise GrammarError(
                f"the grammar takes {seconds:.1f} s to compile, more than {MAX_COMPILE_SECONDS} s; "
                "simplify it, for example by fewer alternatives"
            )

    def start(self, grammar: Grammar) -> GrammarMatcher:
        """A matcher at the start of its text.

        Raises:
            GrammarError: what is wrong, for the client.
        """
        return GrammarMatcher(self, grammar)

    def masks(self, matchers: Sequence[GrammarMatcher]) -> torch.Tensor:
        """(len(matchers), words) int32 on the CPU: bit i of word w allows token 32 * w + i.

        A matcher that fails has its ``error`` set and allows nothing.
        """
        bits: NDArray[np.int32] = llguidance.numpy.allocate_token_bitmask(
            len(matchers), self._tokenizer.vocab_size
        )
        for row, matcher in enumerate(matchers):
            matcher.fill(bits, row)
        return torch.from_numpy(bits)

    def compiled(self, grammar: Grammar) -> CompiledGrammar:
        """From the cache, or made now.

        Raises:
            GrammarError: what is wrong, for the client.
        """
        with self._lock:
            known = self._cache.get(grammar)
            if known is not None:
                self._cache.move_to_end(grammar)
                return known
        made = self._compile(grammar)
        with self._lock:
            self._cache[grammar] = made
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return made

    def discard(self, grammar: Grammar, used_up: CompiledGrammar) -> None:
        """Compile ``grammar`` anew when it is next asked for, if ``used_up`` is still the one."""
        with self._lock:
            if self._cache.get(grammar) is used_up:
                del self._cache[grammar]

    def _compile(self, grammar: Grammar) -> CompiledGrammar:
        begin = self.clock()
        text = _to_llguidance(grammar)
        matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(f"bad {grammar.kind} grammar: {_first_lines(matcher.get_error())}")
        return CompiledGrammar(matcher, self.clock() - begin)


class GrammarMatcher:
    """One sequence's place in its grammar.

    Attributes:
        error: why it cannot go on, for the client; None while it can.
        must_stop: the text is complete and nothing can be added.

    Raises:
        GrammarError: the grammar is bad.
    """

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar) -> None:
        self.eos_token_ids = compiler.eos_token_ids
        self.error: str | None = None
        self.must_stop = False
        self._compiler = compiler
        self._grammar = grammar
        self._compiled = compiler.compiled(grammar)
        self._matcher = self._compiled.matcher.deep_copy()
        self._tokens: list[int] = []
        self._renewals = 0
        self._seconds_left = STEP_ALLOWANCE_SECONDS

    def fill(self, bits: NDArray[np.int32], row: int) -> None:
        """Write the mask of the next token; nothing is allowed after an error."""
        begin = self._compiler.clock()
        llguidance.numpy.fill_next_token_bitmask(self._matcher, bits, row)
        while self._matcher.is_error() and self._renew():
            llguidance.numpy.fill_next_token_bitmask(self._matcher, bits, row)
        self._after_step(self._compiler.clock() - begin)
        if self.error is not None:
            bits[row] = 0
        elif self._matcher.is_accepting():
            self.must_stop = not (bits[row] & ~self._compiler.eos_bits).any()

    def advance(self, token: int) -> str | None:
        """Go past ``token``, which the mask allowed and which is no EOS; returns ``error``."""
        begin = self._compiler.clock()
        self._tokens.append(token)
        self._matcher.consume_token(token)
        while self._matcher.is_error() and self._renew():
            pass
        self._after_step(self._compiler.clock() - begin - STEP_SECONDS_A_TOKEN)
        self.must_stop = self.error is None and bool(self._matcher.is_stopped())
        return self.error

    def _renew(self) -> bool:
        """Go to the same place of a freshly compiled copy; False if that was tried enough."""
        if self.error is not None or self._renewals == RENEWALS:
            return False
        self._renewals += 1
        self._compiler.discard(self._grammar, self._compiled)
        self._compiled = self._compiler.compiled(self._grammar)
        self._matcher = self._compiled.matcher.deep_copy()
        self._matcher.consume_tokens(self._tokens)
        return True

    def _after_step(self, seconds: float) -> None:
        self._seconds_left = min(self._seconds_left - seconds, STEP_ALLOWANCE_SECONDS)
        if self.error is not None:
            return
        if self._matcher.is_error():
            cause = _first_lines(self._matcher.get_error())
            self.error = f"the grammar became too complex or contradicts itself: {cause}"
        elif self._seconds_left < 0:
            self.error = (
                "the grammar is too ambiguous: it takes more than "
                f"{1000 * STEP_SECONDS_A_TOKEN:.0f} ms a token to follow; simplify it"
            )


def forbid(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Set the logits of tokens that the masks do not allow to -inf, in place.

    Args:
        logits: (n, vocab) float32.
        rows: (g,) int64, the rows that have a grammar.
        masks: (g, words) int32 from ``GrammarCompiler.masks``, on any device.
    """
    vocab = logits.shape[1]
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    words = masks.to(logits.device, non_blocking=True).unsqueeze(2)
    allowed = ((words >> shifts) & 1).flatten(1)[:, :vocab].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)


def _bits_of(tokens: Collection[int], vocab_size: int) -> NDArray[np.int32]:
    words = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


def _to_llguidance(grammar: Grammar) -> str:
    spec = grammar.spec
    if len(spec) > MAX_SPEC_CHARACTERS:
        raise GrammarError(
            f"the grammar has {len(spec)} characters; at most {MAX_SPEC_CHARACTERS} are accepted"
        )
    if "\0" in spec:
        raise GrammarError("the grammar holds a NUL character")
    make = llguidance.LLMatcher
    options: Any = {"whitespace_pattern": WHITESPACE}
    text: str
    match grammar.kind:
        case "json_object":
            text = make.grammar_from_json_schema('{"type": "object"}', defaults=options)
        case "json_schema":
            text = make.grammar_from_json_schema(_checked_json(spec), defaults=options)
        case "regex":
            text = make.grammar_from_regex(spec)
        case "lark":
            text = make.grammar_from_lark(spec)
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
    """An error without backtraces and with a length that fits a response."""
    kept = message.split("\n<", 1)[0].strip()
    if kept.startswith("panic:"):
        kept = "it is larger than the compiler can hold"
    return kept[:500]
