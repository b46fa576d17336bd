"""Random logits under a grammar: whatever is drawn parses, validates, and ends."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import llguidance
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pla_serve.engine.sampling import GrammarError, Sampler, SequenceSampling
from pla_serve.grammar import compiler as module
from pla_serve.grammar.compiler import GrammarCompiler
from pla_serve.grammar.limits import GrammarLimits
from pla_serve.grammar.tokenizer import GrammarVocabulary, vocabulary_of
from pla_serve.wire.engine import Grammar, SamplingParams
from tests.engine.local_grammars import LocalGrammars

EOS = 1
Start = Callable[..., SequenceSampling]


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def generate(
    sampler: Sampler, sequence: SequenceSampling, vocab: int, seed: int, steps: int = 400
) -> tuple[list[int], bool]:
    """Tokens without EOS, and whether the text ended by itself."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    for _ in range(steps):
        logits = 2 * torch.randn(1, vocab, generator=generator)
        logits[0, EOS] += 4  # so that optional ends are taken
        sampled = sampler.sample(logits, [sequence])[0]
        assert sampled.error is None
        if sampled.stopped:
            return tokens, True
        tokens.append(sampled.token)
        if sampled.grammar_finished:
            return tokens, True
    return tokens, False


scalars = st.sampled_from(
    [
        {"type": "integer", "minimum": -20, "maximum": 300},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", "green", 7, None]},
        {"type": "string", "maxLength": 6},
        {"type": "string", "pattern": "^[ab]{1,3}$"},
    ]
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def object_of(properties: dict[str, Any], required: int) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:required],
            "additionalProperties": False,
        }

    objects = st.builds(
        object_of, st.dictionaries(st.sampled_from("abc"), inner, max_size=3), st.integers(0, 3)
    )
    arrays = st.builds(lambda one: {"type": "array", "items": one, "maxItems": 3}, inner)
    either = st.builds(lambda one, other: {"anyOf": [one, other]}, inner, inner)
    return objects | arrays | either


schemas = st.recursive(scalars, containers, max_leaves=5)


def valid(value: Any, against: dict[str, Any]) -> bool:
    """The part of JSON schema that ``schemas`` uses."""
    if "anyOf" in against:
        return any(valid(value, one) for one in against["anyOf"])
    if "enum" in against:
        return any(value == one and type(value) is type(one) for one in against["enum"])
    match against["type"]:
        case "integer":
            whole = isinstance(value, int) and not isinstance(value, bool)
            return whole and against["minimum"] <= value <= against["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "string":
            return (
                isinstance(value, str)
                and len(value) <= against.get("maxLength", 1000)
                and re.search(against.get("pattern", ""), value) is not None
            )
        case "array":
            fits = isinstance(value, list) and len(value) <= against["maxItems"]
            return fits and all(valid(one, against["items"]) for one in value)
    return (
        isinstance(value, dict)
        and set(against["required"]) <= set(value) <= set(against["properties"])
        and all(valid(one, against["properties"][key]) for key, one in value.items())
    )


@settings(max_examples=40, deadline=None)
@given(wanted=schemas, seed=st.integers(0, 2**31), temperature=st.sampled_from([0.0, 1.0]))
def test_random_logits_give_valid_documents(
    sampler: Sampler,
    start: Start,
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    wanted: dict[str, Any],
    seed: int,
    temperature: float,
) -> None:
    sequence = start(grammar=schema(wanted), temperature=temperature)
    tokens, ended = generate(sampler, sequence, vocab_size, seed, steps=1500)
    assert ended
    assert valid(json.loads(tokenizer.decode(tokens)), wanted)


@pytest.mark.parametrize("seed", range(5))
def test_json_object_gives_an_object(
    sampler: Sampler,
    start: Start,
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    seed: int,
) -> None:
    sequence = start(grammar=Grammar("json_object"))
    closing = tokenizer.convert_tokens_to_ids("}")
    quote = tokenizer.convert_tokens_to_ids('"')
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    for _ in range(3000):
        logits = torch.randn(1, vocab_size, generator=generator)
        logits[0, [closing, quote]] += 5
        sampled = sampler.sample(logits, [sequence])[0]
        assert sampled.error is None
        tokens += [] if sampled.stopped else [sampled.token]
        if sampled.stopped or sampled.grammar_finished:
            break
    assert isinstance(json.loads(tokenizer.decode(tokens)), dict)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", "(ab|c){2,5}x?"), "(ab|c){2,5}x?"),
        (Grammar("lark", 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'), r"\(*[0-9]+\)*"),
    ],
)
def test_regex_and_lark(
    sampler: Sampler,
    start: Start,
    tokenizer: PreTrainedTokenizerFast,
    vocab_size: int,
    seed: int,
    grammar: Grammar,
    pattern: str,
) -> None:
    tokens, ended = generate(sampler, start(grammar=grammar), vocab_size, seed)
    assert ended
    assert re.fullmatch(pattern, tokenizer.decode(tokens))


def test_ids_beyond_the_tokenizer_are_never_drawn(
    sampler: Sampler, start: Start, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    logits = torch.zeros(1, vocab_size)
    logits[0, len(tokenizer) :] = 100.0
    sequence = start(grammar=Grammar("regex", "[a-z]+"))
    assert sampler.sample(logits, [sequence])[0].token < len(tokenizer)
    assert sampler.sample(logits, [start(temperature=0.0)])[0].token == len(tokenizer)


def test_rows_of_a_mixed_batch_keep_their_own_grammar(
    sampler: Sampler, start: Start, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    logits = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0))
    grammars = [Grammar("regex", "a"), None, Grammar("regex", "b"), None]
    sequences = [start(grammar=one, temperature=0.0) for one in grammars]
    sampled = sampler.sample(logits, sequences)
    assert [tokenizer.decode([sampled[row].token]) for row in (0, 2)] == ["a", "b"]
    assert [sampled[row].token for row in (1, 3)] == logits.argmax(-1)[[1, 3]].tolist()
    assert [one.grammar_finished for one in sampled] == [True, False, True, False]


def test_eos_ends_a_grammar_even_if_eos_is_ignored(
    sampler: Sampler, start: Start, vocab_size: int
) -> None:
    sequence = start(grammar=Grammar("regex", "a*"), ignore_eos=True, temperature=0.0)
    logits = torch.zeros(1, vocab_size)
    logits[0, EOS] = 9.0
    assert sampler.sample(logits, [sequence])[0].stopped


def test_min_tokens_yields_to_a_grammar_that_can_only_stop(
    sampler: Sampler, start: Start, vocab_size: int
) -> None:
    logits = torch.zeros(1, vocab_size)
    logits[0, EOS] = 9.0
    growing = start(grammar=Grammar("regex", "a{0,3}"), min_tokens=2, temperature=0.0)
    first = sampler.sample(logits, [growing])[0]
    assert not first.stopped
    empty = start(grammar=Grammar("regex", ""), min_tokens=2, temperature=0.0)
    assert sampler.sample(logits, [empty])[0].stopped


def test_a_bias_against_all_that_the_grammar_allows_is_an_error_of_that_row_only(
    sampler: Sampler, start: Start, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    token = tokenizer.convert_tokens_to_ids("a")
    never = start(grammar=Grammar("regex", "a"), logit_bias={token: float("-inf")})
    failed, fine = sampler.sample(torch.zeros(2, vocab_size), [never, start()])
    assert failed.error is not None
    assert "exclude all" in failed.error
    assert fine.error is None


AMBIGUOUS = Grammar("lark", 'start: s\ns: s s | "x" | s s s')


def fails_alone(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> str:
    """Run an ambiguous grammar beside a free sequence; return the error that ends it."""
    sampler = Sampler(vocab_size, torch.device("cpu"), LocalGrammars(compiler))
    logits = torch.zeros(2, vocab_size)
    logits[0, tokenizer.convert_tokens_to_ids("x")] = 50.0
    nasty, other = (
        sampler.start(
            name,
            (),
            SamplingParams(max_tokens=1000, temperature=0.0, grammar=grammar),
            frozenset({EOS}),
            default_seed=0,
        )
        for name, grammar in (("nasty", AMBIGUOUS), ("other", None))
    )
    for _ in range(300):
        failed, fine = sampler.sample(logits, [nasty, other])
        assert fine.error is None
        if failed.error is not None:
            again, fine = sampler.sample(logits, [nasty, other])
            assert (again.error, fine.error) == (failed.error, None)
            return failed.error
    raise AssertionError("the grammar never failed")


def test_a_grammar_that_passes_the_limits_midway_fails_alone(
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: GrammarVocabulary,
    vocab_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = llguidance.LLParserLimits(max_items_in_row=40, verbose_errors=False)
    monkeypatch.setattr(module, "LIMITS", limits)
    error = fails_alone(GrammarCompiler(vocabulary), tokenizer, vocab_size)
    assert "max is 40" in error


def test_a_grammar_that_is_slow_to_follow_fails_alone(
    tokenizer: PreTrainedTokenizerFast, vocabulary: GrammarVocabulary, vocab_size: int
) -> None:
    readings = itertools.count(step=0.05)
    compiler = GrammarCompiler(vocabulary, clock=lambda: next(readings))
    assert "too ambiguous" in fails_alone(compiler, tokenizer, vocab_size)


def test_a_used_up_grammar_is_compiled_anew_and_nobody_notices(
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: GrammarVocabulary,
    vocab_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each text visits states of its own; together they pass a limit that none passes alone."""
    limits = llguidance.LLParserLimits(max_lexer_states=150, verbose_errors=False)
    monkeypatch.setattr(module, "LIMITS", limits)
    compiler = GrammarCompiler(vocabulary)
    sampler = Sampler(vocab_size, torch.device("cpu"), LocalGrammars(compiler))
    params = SamplingParams(max_tokens=99, grammar=Grammar("regex", "([ab]*a[ab]{9}c)?"))
    compiled = []
    for text in range(12):
        name = str(text)
        sequence = sampler.start(name, (), params, frozenset({EOS}), default_seed=0)
        logits = torch.full((1, vocab_size), -50.0)
        logits[0, [tokenizer.convert_tokens_to_ids(one) for one in "ab"]] = 0.0
        drawn = [sampler.sample(logits, [sequence])[0] for _ in range(24)]
        assert [one.error for one in drawn] == [None] * 24
        compiled.append(compiler.compiled(params.grammar))
    assert len(set(map(id, compiled))) > 1


@pytest.mark.parametrize(
    ("grammar", "cause"),
    [
        (Grammar("json_schema", "{"), "not JSON"),
        (Grammar("json_schema", "[1]"), "must be a JSON object"),
        (Grammar("json_schema", '{"minimum": NaN}'), "NaN"),
        (Grammar("json_schema", "[" * 100_000), "not JSON"),
        (Grammar("json_schema", '{"type": "objekt"}'), "objekt"),
        (Grammar("json_schema", '{"not": {"type": "string"}}'), "not"),
        (Grammar("json_schema", '{"$ref": "#/nowhere"}'), "nowhere"),
        (Grammar("json_schema", '{"$ref": "http://127.0.0.1:9/x"}'), "does not fetch"),
        (Grammar("json_schema", '{"$ref": "file:///etc/passwd"}'), "does not fetch"),
        (Grammar("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}'), "5"),
        (Grammar("json_schema", '{"type": "string", "pattern": "("}'), "unclosed group"),
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", "a\0"), "NUL"),
        (Grammar("regex", "(" * 5000 + ")" * 5000), "regex"),
        (Grammar("lark", "start: foo"), "foo"),
        (Grammar("lark", "begin: /a/"), "no start rule"),
        (Grammar("lark", ""), "Empty grammar"),
        (Grammar("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000), "nested"),
        (Grammar("regex", "a" * 300_000), "characters"),
    ],
)
def test_bad_grammars_are_refused_with_their_cause(
    compiler: GrammarCompiler, start: Start, grammar: Grammar, cause: str
) -> None:
    for attempt in (compiler.check_grammar, lambda bad: start(grammar=bad)):
        with pytest.raises(GrammarError) as caught:
            attempt(grammar)
        assert cause in str(caught.value)
        assert len(str(caught.value)) < 700


def test_a_schema_that_explodes_is_refused(compiler: GrammarCompiler) -> None:
    def branch(row: int) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "object", "properties": {f"a{row}{column}": {"type": "integer"}}}
                for column in range(4)
            ]
        }

    with pytest.raises(GrammarError, match="too big"):
        compiler.check_grammar(schema({"allOf": [branch(row) for row in range(6)]}))


def test_slow_compilation_is_refused(
    vocabulary: GrammarVocabulary,
) -> None:
    compiler = GrammarCompiler(vocabulary, limits=GrammarLimits(compile_seconds=-1.0))
    with pytest.raises(GrammarError, match="to compile"):
        compiler.check_grammar(Grammar("regex", "abc"))


def test_known_grammars_are_not_compiled_again(
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: GrammarVocabulary,
    vocab_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[Grammar] = []
    original = module._to_llguidance
    monkeypatch.setattr(module, "_to_llguidance", lambda one: compiled.append(one) or original(one))
    compiler = GrammarCompiler(vocabulary, cache_size=2)
    for spec in ("a", "b", "a", "b", "c", "c", "a"):
        compiler.start(Grammar("regex", spec))
    assert [one.spec for one in compiled] == ["a", "b", "c", "a"]


def test_two_sequences_of_one_grammar_do_not_share_their_place(
    sampler: Sampler, start: Start, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    first = start(grammar=Grammar("regex", "ab"))
    logits = torch.zeros(1, vocab_size)
    assert tokenizer.decode([sampler.sample(logits, [first])[0].token]) == "a"
    second = start(grammar=Grammar("regex", "ab"))
    assert tokenizer.decode([sampler.sample(logits, [second])[0].token]) == "a"
    assert tokenizer.decode([sampler.sample(logits, [first])[0].token]) == "b"


def test_a_tokenizer_without_eos_is_refused_by_name(vocab_size: int) -> None:
    class NoEnd:
        eos_token_id = None

    with pytest.raises(ValueError, match="need an EOS token"):
        vocabulary_of(NoEnd(), vocab_size)
