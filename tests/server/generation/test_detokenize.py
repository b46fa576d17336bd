"""Against ``decode`` of all tokens at once and against ``str.find``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pla_serve.server.generation.detokenize import Detokenizer, StopString, TokenBytes
from tests.server.server_harness import make_tokenizer

SAMPLES = ["Grüße, 世界! 😀👩‍👩‍👧 e\u0301 hello  world\r\n\t", "def f(x):\n    return x + 1\n"]
SPECIAL = ["<s>", "</s>"]


def byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SAMPLES * 3,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.add_tokens(["<tool>", "naïve ☃"])
    return core


def sentencepiece(strip: bool) -> Tokenizer:
    """As Llama 2 and Mistral have it; Gemma's strips no leading space."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁a", "a", "b", "▁bé", "é", "世", "\ufffd", "<0x", "\n", ""]
    core = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, []))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    core.add_special_tokens(SPECIAL)
    return core


def other(decoder: decoders.Decoder | None) -> Tokenizer:
    pieces = [*SPECIAL, "▁a", "a", "##b", "c", "▁", "é", "世"]
    core = Tokenizer(models.WordLevel({piece: at for at, piece in enumerate(pieces)}, "a"))
    if decoder is not None:
        core.decoder = decoder
    core.add_special_tokens(SPECIAL)
    return core


BYTE_LEVEL = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")
PIECES = {strip: PreTrainedTokenizerFast(tokenizer_object=sentencepiece(strip)) for strip in (0, 1)}
OTHERS = [
    PreTrainedTokenizerFast(tokenizer_object=other(decoder))
    for decoder in (
        None,
        decoders.Metaspace(),
        decoders.Metaspace(prepend_scheme="never"),
        decoders.WordPiece(cleanup=False),
    )
]


def whole(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], skip: bool = True) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def split(ids: list[int], cuts: Iterable[int]) -> list[list[int]]:
    edges = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in pairwise(edges)]


def in_parts(detokenizer: Detokenizer, parts: list[list[int]]) -> str:
    texts = [detokenizer.push(part).text for part in parts]
    return "".join(texts) + detokenizer.finish().text


cuts = st.lists(st.integers(0, 200), max_size=20)
texts = st.text(
    st.characters(codec="utf-8")
    | st.sampled_from("😀👩\u200d👧🏽世界é\u0301\u0308\0\x7f\r\n\t\ufffd\u202e \U0010ffff"),
    max_size=30,
)


@settings(deadline=None)
@given(text=texts, cuts=cuts)
def test_text_comes_back_whole(text: str, cuts: list[int]) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL)
    pushed = "".join(detokenizer.push(part).text for part in split(ids, cuts))
    # Complete characters are never held back, so nothing is left to finish.
    assert pushed == text == whole(BYTE_LEVEL, ids)
    assert detokenizer.finish().text == ""


def ids_of(tokenizer: PreTrainedTokenizerFast) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(tokenizer) + 2), max_size=40)


@settings(deadline=None)
@given(ids=ids_of(BYTE_LEVEL), cuts=cuts, skip=st.booleans())
def test_any_tokens_of_byte_level_bpe(ids: list[int], cuts: list[int], skip: bool) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, skip_special_tokens=skip)
    assert in_parts(detokenizer, split(ids, cuts)) == whole(BYTE_LEVEL, ids, skip)


@settings(deadline=None)
@given(raw=st.binary(max_size=30), cuts=cuts)
def test_any_bytes(raw: bytes, cuts: list[int]) -> None:
    spelling = {
        raw: at
        for at in range(len(SPECIAL), len(BYTE_LEVEL))
        if len(raw := TokenBytes(BYTE_LEVEL).within(at)) == 1
    }
    ids = [spelling[bytes([byte])] for byte in raw]
    text = in_parts(Detokenizer(BYTE_LEVEL), split(ids, cuts))
    assert text == whole(BYTE_LEVEL, ids) == raw.decode("utf-8", "replace")


def byte_ids(raw: bytes) -> list[int]:
    return [len(SPECIAL) + byte for byte in raw]


PIECE_COUNT = len(PIECES[0])
plain_pieces = st.integers(len(SPECIAL) + 256, PIECE_COUNT - 1).map(lambda one: [one])
runs = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=4).map(str.encode),
    st.sampled_from([b"\xe4\xbd", b"\xff", b"\xf0\x9f\x98", b"\x80\x80", b"\xc0\xaf", b" ", b"a"]),
).map(byte_ids)
special_pieces = st.sampled_from([[0], [1]])


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(runs | special_pieces | plain_pieces, plain_pieces), max_size=12),
    cuts=cuts,
    skip=st.booleans(),
    strip=st.sampled_from([0, 1]),
    lead=st.lists(plain_pieces | special_pieces, max_size=2),
)
def test_any_tokens_of_sentencepiece(pairs, cuts, skip, strip, lead) -> None:
    """Byte runs that are valid as a whole or not at all, with other tokens between them."""
    ids = [one for part in [*lead, *(one for pair in pairs for one in pair)] for one in part]
    detokenizer = Detokenizer(PIECES[strip], skip_special_tokens=skip)
    assert in_parts(detokenizer, split(ids, cuts)) == whole(PIECES[strip], ids, skip)


def test_a_complete_character_of_a_broken_byte_run_stays() -> None:
    detokenizer = Detokenizer(PIECES[1])
    assert [detokenizer.push([one]).text for one in byte_ids("世".encode())] == ["", "", "世"]
    assert detokenizer.push(byte_ids(b"\xff")).text == "\ufffd"


@settings(deadline=None)
@given(data=st.data(), cuts=cuts, skip=st.booleans(), tokenizer=st.sampled_from(OTHERS))
def test_any_tokens_of_other_decoders(data, cuts, skip, tokenizer) -> None:
    ids = data.draw(ids_of(tokenizer))
    # Without a decoder ``decode`` puts spaces between tokens, and skips unknown ids before that.
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    assert in_parts(detokenizer, split(ids, cuts)) == whole(tokenizer, ids, skip)


byte_level_words = st.sampled_from(["hello", " world", "<tool>", "世界", "Paris", " Paris", "\n"])
word_pieces = st.integers(len(SPECIAL), len(SPECIAL) + 6).map(lambda one: [one])
continued = st.sampled_from(
    [
        (
            BYTE_LEVEL,
            byte_level_words.map(lambda w: BYTE_LEVEL.encode(w, add_special_tokens=False)),
        ),
        *((tokenizer, plain_pieces | special_pieces) for tokenizer in PIECES.values()),
        *((tokenizer, word_pieces | special_pieces) for tokenizer in OTHERS[1:]),
    ]
)


@settings(deadline=None)
@given(data=st.data(), cuts=cuts, skip=st.booleans(), kind=continued)
def test_a_text_goes_on_where_its_prompt_ended(data, cuts, skip, kind) -> None:
    """Prompt and answer decoded together are the prompt's text and then the answer's.

    A tokenizer without a decoder puts spaces between tokens and none after the last one, so it has
    no such text; it is left out.
    """
    tokenizer, pieces = kind
    prompt = [one for part in data.draw(st.lists(pieces, max_size=4)) for one in part]
    ids = [one for part in data.draw(st.lists(pieces, max_size=6)) for one in part]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, prompt=prompt)
    together = whole(tokenizer, [*prompt, *ids], skip)
    assert whole(tokenizer, prompt, skip) + in_parts(detokenizer, split(ids, cuts)) == together


@pytest.mark.parametrize("strip", [0, 1])
def test_the_first_space_of_an_answer_stays_after_a_prompt_with_text(strip: int) -> None:
    tokenizer = PIECES[strip]
    space_a, b = tokenizer.convert_tokens_to_ids(["▁a", "b"])
    assert Detokenizer(tokenizer, prompt=[0, b]).push([space_a]).text == " a"
    assert Detokenizer(tokenizer, prompt=[0]).push([space_a]).text == (" a", "a")[strip]
    stopped = Detokenizer(tokenizer, (" a",), prompt=[b]).push([b, space_a])
    assert (stopped.text, stopped.stopped_by) == ("b", " a")


def test_half_a_character_waits_for_its_rest() -> None:
    ids = [one for byte in "😀".encode() for one in byte_ids(bytes([byte]))]
    detokenizer = Detokenizer(PIECES[1])
    assert [detokenizer.push([one]).text for one in ids] == ["", "", "", "😀"]
    detokenizer.push(ids[:2])
    assert detokenizer.finish().text == "\ufffd\ufffd"


def test_a_broken_character_is_given_up_at_once() -> None:
    detokenizer = Detokenizer(PIECES[1])
    assert detokenizer.push(byte_ids(b"\xe4\xbd")).text == ""
    assert detokenizer.push(byte_ids(b"a")).text == "\ufffd\ufffda"


def expected_stop(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, by = min(found)
    return text[: end if include else end - len(by)], by


few = st.text("ab😀 ", max_size=25)


@settings(max_examples=300, deadline=None)
@given(
    text=few,
    stops=st.lists(st.text("ab😀 ", min_size=1, max_size=5), max_size=4),
    cuts=cuts,
    include=st.booleans(),
)
def test_stop_strings_match_find(text, stops, cuts, include) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL, tuple(stops), include)
    wanted, by = expected_stop(text, stops, include)
    got, seen, stopped_by = "", [], None
    for part in split(ids, cuts):
        delta = detokenizer.push(part)
        got += delta.text
        seen += part
        stopped_by = delta.stopped_by
        if stopped_by is not None:
            break
        held = whole(BYTE_LEVEL, seen).removesuffix("\ufffd")[len(got) :]
        # Held back is only what may still become a stop string.
        assert any(stop.startswith(held) for stop in stops) or not held
    last = detokenizer.finish()
    assert (got + last.text, stopped_by) == (wanted, by)
    assert last.stopped_by == by


@given(text=st.text("ab", max_size=60), stop=st.text("ab", min_size=1, max_size=8))
def test_matcher_finds_the_first_occurrence(text: str, stop: str) -> None:
    matcher = StopString(stop)
    for end, char in enumerate(text, 1):
        if matcher.feed(char):
            assert end == text.find(stop) + len(stop)
            return
        longest = next(n for n in range(len(stop), -1, -1) if text[:end].endswith(stop[:n]))
        assert matcher.matched == longest
    assert stop not in text


def test_a_stop_string_inside_one_token_cuts_it() -> None:
    token = BYTE_LEVEL.convert_tokens_to_ids("<tool>")
    assert Detokenizer(BYTE_LEVEL, ("oo",)).push([token]).text == "<t"
    assert Detokenizer(BYTE_LEVEL, ("oo",), True).push([token]).text == "<too"


def test_the_stop_that_is_complete_first_wins() -> None:
    ids = BYTE_LEVEL.encode("xabcd", add_special_tokens=False)
    delta = Detokenizer(BYTE_LEVEL, ("abcd", "bc")).push(ids)
    assert (delta.text, delta.stopped_by) == ("xa", "bc")
    delta = Detokenizer(BYTE_LEVEL, ("bc", "abc")).push(ids)
    assert (delta.text, delta.stopped_by) == ("x", "abc")


def test_nothing_comes_after_a_stop() -> None:
    ids = BYTE_LEVEL.encode("ab", add_special_tokens=False)
    detokenizer = Detokenizer(BYTE_LEVEL, ("a",))
    for delta in (detokenizer.push(ids), detokenizer.push(ids), detokenizer.finish()):
        assert (delta.text, delta.stopped_by) == ("", "a")


def test_text_held_for_a_stop_comes_with_finish() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, ("hello world",))
    ids = BYTE_LEVEL.encode("say hello", add_special_tokens=False)
    assert detokenizer.push(ids).text == "say "
    assert detokenizer.finish().text == "hello"


def test_a_shared_table_is_asked_once_for_each_token() -> None:
    calls: list[list[int]] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(PIECES[1].backend_tokenizer, name)

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            calls.append(ids)
            text = PIECES[1].backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
            return str(text)

    table = TokenBytes(Counting())
    ids = [one for _ in range(50) for one in range(256, PIECE_COUNT)]
    for _ in range(2):
        Detokenizer(table).push(ids)
    assert len(calls) < 3 * PIECE_COUNT


def test_bytes_of_single_tokens() -> None:
    level, pieces = TokenBytes(BYTE_LEVEL), TokenBytes(PIECES[1])
    assert pieces.within(byte_ids(b"\xe4")[0]) == b"\xe4"
    assert pieces.within(PIECES[1].convert_tokens_to_ids("▁a")) == b" a"
    assert pieces.at_start(PIECES[1].convert_tokens_to_ids("▁a")) == b"a"
    assert level.within(BYTE_LEVEL.convert_tokens_to_ids("naïve ☃")) == "naïve ☃".encode()
    assert level.within(len(BYTE_LEVEL) + 5) == b""


def test_empty_stop_strings_and_slow_tokenizers_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        Detokenizer(BYTE_LEVEL, ("",))
    with pytest.raises(ValueError, match="object is no fast tokenizer"):
        TokenBytes(object())


@pytest.mark.parametrize(
    ("text", "min_tokens", "right"),
    [
        ("abab", 0, "a"),
        ("abab", 1, "a"),
        ("abab", 2, "aba"),
        ("abab", 3, "aba"),
        ("abab", 4, "abab"),
        ("aabb", 2, "aa"),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_stop_strings_do_not_count_in_the_first_tokens(
    text: str, min_tokens: int, right: str, at_once: bool
) -> None:
    """A token of `make_tokenizer` is one character; the stop string is "b"."""
    detokenizer = Detokenizer(make_tokenizer(), ["b"], min_tokens=min_tokens)
    tokens = list(text.encode())
    pieces = [tokens] if at_once else [[token] for token in tokens]
    found = "".join(detokenizer.push(piece).text for piece in pieces) + detokenizer.finish().text
    assert found == right


def test_a_stop_string_may_begin_in_the_first_tokens() -> None:
    detokenizer = Detokenizer(make_tokenizer(), ["aba"], min_tokens=3)
    assert detokenizer.push(b"ababx").stopped_by is None
    detokenizer = Detokenizer(make_tokenizer(), ["aba"], min_tokens=3)
    delta = detokenizer.push(b"ababa")
    assert (delta.text, delta.stopped_by) == ("ab", "aba")
