"""Turns logits into tokens: penalties, filters, seeded draws, grammars and log-probabilities."""

from pla_serve.engine.sampling.errors import GrammarError, SamplingError
from pla_serve.engine.sampling.grammar import GrammarCompiler
from pla_serve.engine.sampling.sampler import Sampler, TokenChoice
from pla_serve.engine.sampling.sequence import Sampled, SequenceSampling

__all__ = [
    "GrammarCompiler",
    "GrammarError",
    "Sampled",
    "Sampler",
    "SamplingError",
    "SequenceSampling",
    "TokenChoice",
]
