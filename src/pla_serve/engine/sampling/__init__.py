"""Turns logits into tokens: penalties, filters, seeded draws, grammars and log-probabilities."""

from pla_serve.engine.sampling.errors import GrammarError, SamplingError
from pla_serve.engine.sampling.grammar import GrammarCompiler
from pla_serve.engine.sampling.sampler import Choice, Sampler
from pla_serve.engine.sampling.sequence import Sampled, SequenceSampling

__all__ = [
    "Choice",
    "GrammarCompiler",
    "GrammarError",
    "Sampled",
    "Sampler",
    "SamplingError",
    "SequenceSampling",
]
