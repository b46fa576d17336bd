"""GGUF files with sentencepiece vocabularies: the tokens are those of sentencepiece itself."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from pla_serve.engine.loading import UnsupportedModel
from pla_serve.engine.loading.convert import convert
from tests.engine.loading import tiny

VOCABULARY = 700
TEXT = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
LINES = [*TEXT.splitlines(), *["    indented", "        deeper", "  1984 naïve"] * 40]
FRAGMENTS = ("\n", "\t", "<0x0A>", "▁", "1984", "é🙂漢字", "\r\n", "naïve", "\u00a0", "\0")


def trained(**options: Any) -> SentencePieceProcessor:
    """A model as Llama 2's was trained, on this repository's own text."""
    model = io.BytesIO()
    llama = {
        "model_type": "bpe",
        "vocab_size": VOCABULARY,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.999,
        "minloglevel": 2,
        "num_threads": 1,
    }
    SentencePieceTrainer.train(
        sentence_iterator=iter(line for line in LINES if line),
        model_writer=model,
        **{**llama, **options},
    )
    return SentencePieceProcessor(model_proto=model.getvalue())


def kind(model: SentencePieceProcessor, id: int) -> TokenType:
    if model.is_unknown(id):
        return TokenType.UNKNOWN
    if model.is_control(id):
        return TokenType.CONTROL
    return TokenType.BYTE if model.is_byte(id) else TokenType.NORMAL


def converted(tmp_path: Path, model: SentencePieceProcessor, **keys: Any) -> Any:
    """The tokenizer of the folder that the model's GGUF file becomes."""
    ids = range(model.get_piece_size())

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(id) for id in ids])
        writer.add_token_scores([model.get_score(id) for id in ids])
        writer.add_token_types([kind(model, id) for id in ids])
        writer.add_bos_token_id(model.bos_id())
        writer.add_eos_token_id(model.eos_id())
        writer.add_unk_token_id(model.unk_id())
        writer.add_add_bos_token(True)
        for name, value in keys.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)

    config = tiny.config("Llama", vocab_size=len(ids), head_dim=16, tie_word_embeddings=True)
    tiny.write_gguf(tmp_path / "m.gguf", tiny.model(config), add_tokenizer=add)
    convert(tmp_path / "m.gguf", tmp_path / "out")
    return AutoTokenizer.from_pretrained(tmp_path / "out")


def texts(seed: int, count: int) -> list[str]:
    """Random texts of words, runs of spaces and letters, bytes and characters without a piece."""
    draw = random.Random(seed)
    words = TEXT.split()

    def part() -> str:
        choices = (
            draw.choice(words),
            " " * draw.randint(1, 9),
            " " + draw.choice(words),
            "a" * draw.randint(1, 7),
            "ab" * draw.randint(1, 4),
            draw.choice(FRAGMENTS),
        )
        return draw.choice(choices)

    return ["".join(part() for _ in range(draw.randint(1, 12))) for _ in range(count)]


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_tokens_are_those_of_sentencepiece(
    tmp_path: Path, prefixed: bool, byte_fallback: bool
) -> None:
    model = trained(add_dummy_prefix=prefixed, byte_fallback=byte_fallback, vocab_size=VOCABULARY)
    tokenizer = converted(tmp_path, model, add_space_prefix=prefixed)
    samples = [*LINES, "", " ", "  ", " a", "a", *texts(seed=1, count=1500)]
    for text in samples:
        assert ids(tokenizer, text) == model.encode(text), repr(text)
    assert tokenizer("a")["input_ids"] == [model.bos_id(), *model.encode("a")]


def test_a_leading_space_is_kept_both_ways(tmp_path: Path) -> None:
    """Also in files that say nothing of the prefix, as older ones do not."""
    model = trained()
    tokenizer = converted(tmp_path, model)
    assert ids(tokenizer, " tokens") == model.encode(" tokens") != ids(tokenizer, "tokens")
    for text in (*LINES[:200], " tokens", "  tokens", "tokens ", "é🙂 x"):
        assert tokenizer.decode(ids(tokenizer, text)) == text


def test_control_pieces_stay_whole(tmp_path: Path) -> None:
    model = trained(control_symbols=["<turn>"])
    tokenizer = converted(tmp_path, model)
    assert ids(tokenizer, "<turn>") == [model.piece_to_id("<turn>")]
    assert ids(tokenizer, "a<turn>b") == [*ids(tokenizer, "a"), *ids(tokenizer, "<turn>b")]


def test_texts_that_are_normalised_otherwise_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="normalises texts"):
        converted(tmp_path, trained(), remove_extra_whitespaces=True)
