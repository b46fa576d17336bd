"""Which tokenizers grammars can be built on."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pla_serve.grammar.tokenizer import decoder_types, vocabulary_of

METASPACE = decoders.Metaspace()
LLAMA_2 = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def fast(decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, "a"))
    if decoder is not None:
        core.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.mark.parametrize(("decoder", "kinds"), [(None, "no decoder"), (METASPACE, "Metaspace")])
def test_tokens_that_stand_for_no_bytes_are_refused_by_name(
    decoder: decoders.Decoder | None, kinds: str
) -> None:
    with pytest.raises(ValueError, match=f"this one has {kinds}"):
        vocabulary_of(fast(decoder), 2)


@pytest.mark.parametrize("decoder", [decoders.ByteLevel(), LLAMA_2])
def test_tokens_that_stand_for_bytes_will_do(decoder: decoders.Decoder) -> None:
    assert vocabulary_of(fast(decoder), 5).size == 5


def test_the_decoders_of_a_sequence_are_told_in_order() -> None:
    backend = fast(LLAMA_2).backend_tokenizer
    assert decoder_types(backend) == ["Replace", "ByteFallback", "Fuse", "Strip"]
