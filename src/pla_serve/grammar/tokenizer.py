"""What a grammar worker has to know of a model's tokens."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GrammarVocabulary:
    """A vocabulary, without the library that made it.

    Attributes:
        tokenizer_json: a tokenizer of Hugging Face's ``tokenizers``, serialised.
        size: ids of the model's logits; ids that the tokenizer lacks are never allowed.
        eos_token_ids: ids that end a text; at least one.
    """

    tokenizer_json: str
    size: int
    eos_token_ids: frozenset[int]


def vocabulary_of(
    tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int] = ()
) -> GrammarVocabulary:
    """The vocabulary of a fast ``transformers`` tokenizer.

    Args:
        vocab_size: width of the model's logits.
        eos_token_ids: the model's, beside the tokenizer's own.

    Raises:
        ValueError: the tokenizer is not a fast one, or there is no EOS token.
    """
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    ends = frozenset(own) | frozenset(eos_token_ids)
    if not ends:
        raise ValueError("grammars need an EOS token, and neither model nor tokenizer has one")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError("grammars need a fast tokenizer, and this one is not")
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return GrammarVocabulary(backend.to_str(), max(vocab_size, len(tokenizer)), ends)
