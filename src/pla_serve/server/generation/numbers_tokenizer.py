"""A tokenizer for models that have none: random weights made from a bare config."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def numbers_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Writes every token as its id, with spaces between: the text "7 12" is the tokens 7 and 12."""
    words = {str(token): token for token in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
