"""A byte-level tokenizer of a few hundred tokens, and a short way to start sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pla_serve.engine.sampling import Sampler, SequenceSampling
from pla_serve.grammar.compiler import GrammarCompiler
from pla_serve.grammar.tokenizer import GrammarVocabulary, vocabulary_of
from pla_serve.wire.engine import SamplingParams
from tests.engine.local_grammars import LocalGrammars

EOS = 1
TEXTS = ['{"name": "bob", "age": 12, "tags": ["a", "b"]}', "true false null", "hello world 3.5e-7"]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """320 tokens at most; 0 is <s>, 1 is </s>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """A model's vocabulary, padded beyond the tokenizer's."""
    return len(tokenizer) + 13


@pytest.fixture(scope="session")
def vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> GrammarVocabulary:
    return vocabulary_of(tokenizer, vocab_size)


@pytest.fixture(scope="session")
def compiler(vocabulary: GrammarVocabulary) -> GrammarCompiler:
    return GrammarCompiler(vocabulary)


@pytest.fixture(scope="session")
def sampler(vocab_size: int, compiler: GrammarCompiler) -> Sampler:
    return Sampler(vocab_size, torch.device("cpu"), LocalGrammars(compiler))


@pytest.fixture(scope="session")
def start(sampler: Sampler) -> Callable[..., SequenceSampling]:
    """start(id, prompt, **sampling params)"""

    def make(request_id: str = "r", prompt: Any = (5, 6, 7), **params: Any) -> SequenceSampling:
        params.setdefault("max_tokens", 100)
        return sampler.start(
            request_id, prompt, SamplingParams(**params), frozenset({EOS}), default_seed=0
        )

    return make
