"""Turns logits into tokens: penalties, filters, seeded draws, grammars and log-probabilities."""

from pla_serve.engine.sampling.errors import (
    NOT_OF_ONE_REQUEST,
    GrammarError,
    SamplingError,
)
from pla_serve.engine.sampling.grammars import GrammarFollower, Grammars
from pla_serve.engine.sampling.sampler import Sampler, TokenChoice
from pla_serve.engine.sampling.sequence import Sampled, SequenceSampling

__all__ = [
    "NOT_OF_ONE_REQUEST",
    "GrammarError",
    "GrammarFollower",
    "Grammars",
    "Sampled",
    "Sampler",
    "SamplingError",
    "SequenceSampling",
    "TokenChoice",
]
