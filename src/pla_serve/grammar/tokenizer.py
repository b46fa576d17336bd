"""Vocabulary of a model in the form that grammar workers need."""

from __future__ import annotations

import json
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
        ValueError: the tokenizer is not a fast one, its tokens do not stand for bytes, or there is
            no EOS token.
    """
    own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    ends = frozenset(own) | frozenset(eos_token_ids)
    if not ends:
        raise ValueError("grammars need an EOS token, and neither model nor tokenizer has one")
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError("grammars need a fast tokenizer, and this one is not")
    kinds = decoder_types(tokenizer.backend_tokenizer)
    if not {"ByteLevel", "ByteFallback"} & set(kinds):
        raise ValueError(
            "grammars need a tokenizer whose tokens stand for bytes (decoder ByteLevel or "
            f"ByteFallback), and this one has {', '.join(kinds) or 'no decoder'}"
        )
    backend = copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return GrammarVocabulary(backend.to_str(), max(vocab_size, len(tokenizer)), ends)


def decoder_types(backend: Any) -> list[str]:
    """Types of the decoders of a ``tokenizers.Tokenizer``, in order; none if it has no decoder.

    >>> decoder_types(tokenizer)  # of Llama 2
    ['Replace', 'ByteFallback', 'Fuse', 'Strip']
    """
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return [str(part["type"]) for part in state.get("decoders", [state])]
