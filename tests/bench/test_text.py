from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from pla_serve.bench.text import FillerPart, calibrated, load_tokenizer, make_filler


def word_tokenizer(words: list[str]) -> Tokenizer:
    """One token for each of ``words``; everything else falls apart into letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"##{letter}" for letter in letters), "?", *words]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


WORDS = list(make_filler("x").vocabulary)


@given(st.text(max_size=5), st.integers(1, 60), st.integers(1, 60))
def test_a_shorter_piece_begins_the_longer_one(key: str, low: int, high: int) -> None:
    low, high = sorted((low, high))
    filler = make_filler("salt")
    assert (
        filler.words([FillerPart(key, high)]).split()[:low]
        == filler.words([FillerPart(key, low)]).split()
    )
    assert filler.ids([FillerPart(key, high)])[:low] == filler.ids([FillerPart(key, low)])


def test_another_salt_or_key_shares_nothing() -> None:
    texts = [
        make_filler(salt).words([FillerPart(key, 50)]).split()[:4]
        for salt in ("a", "b")
        for key in ("x", "y")
    ]
    assert len({tuple(text) for text in texts}) == 4


def test_the_same_salt_repeats_itself() -> None:
    pieces = [FillerPart("a", 5), FillerPart("b", 7)]
    assert make_filler("s").words(pieces) == make_filler("s").words(pieces)
    assert make_filler("s").ids(pieces) == make_filler("s").ids(pieces)


def test_with_a_tokenizer_words_are_tokens() -> None:
    tokenizer = word_tokenizer(WORDS[:200])
    filler = make_filler("s", tokenizer)
    assert set(filler.vocabulary) == set(WORDS[:200])
    text = filler.words([FillerPart("a", 321)])
    assert tokenizer.encode(text).ids == filler.ids([FillerPart("a", 321)])
    assert len(filler.ids([FillerPart("a", 321)])) == 321


def test_with_a_poor_tokenizer_words_are_counted() -> None:
    tokenizer = word_tokenizer(WORDS[:50])
    filler = make_filler("s", tokenizer)
    assert filler.tokens_per_word > 1
    tokens = len(tokenizer.encode(filler.words([FillerPart("a", 2000)])).ids)
    assert tokens == pytest.approx(2000, rel=0.2)


def test_the_server_can_say_how_long_words_are() -> None:
    filler = calibrated(make_filler("s"), 400, 800)
    assert len(filler.words([FillerPart("a", 100)]).split()) == 50


@pytest.mark.parametrize("tokens", [0, -5, 100_000])
def test_counts_that_cannot_be_are_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match="cannot size prompts"):
        calibrated(make_filler("s"), 400, tokens)


def test_ids_stay_inside_the_vocabulary() -> None:
    ids = make_filler("s", vocabulary_size=1200).ids([FillerPart("a", 500)])
    assert min(ids) >= 1000
    assert max(ids) < 1200


def test_load_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    word_tokenizer(WORDS[:9]).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path) is not None
    assert load_tokenizer(tmp_path / "tokenizer.json") is not None
