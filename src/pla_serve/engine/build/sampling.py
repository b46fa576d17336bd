"""Stage 6: what requests may ask for, and how their tokens are chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pla_serve.engine.loading import ModelSource, load_tokenizer
from pla_serve.engine.requests.admission import RequestLimits
from pla_serve.engine.sampling import Sampler
from pla_serve.engine.sampling.grammar_workers import GrammarWorkers
from pla_serve.grammar.tokenizer import vocabulary_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Limits of requests, and the sampler that honours their parameters."""

    limits: RequestLimits
    sampler: Sampler


def build_sampling(
    source: ModelSource,
    limits: RequestLimits,
    device: torch.device,
    clock: Callable[[], float],
) -> Sampling:
    """Make the sampler, with structured output if the tokenizer allows it.

    Args:
        device: where the logits are.
        clock: monotonic seconds.
    """
    return Sampling(limits, Sampler(limits.vocab_size, device, _grammars(source, limits, clock)))


def _grammars(
    source: ModelSource, limits: RequestLimits, clock: Callable[[], float]
) -> GrammarWorkers | None:
    """Return None, and log the reason, if grammars cannot be built on the tokenizer."""
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        return None
    try:
        vocabulary = vocabulary_of(tokenizer, limits.vocab_size, limits.eos_token_ids)
        return GrammarWorkers(vocabulary, clock=clock)
    except ValueError as error:
        log.warning("structured output is off, this tokenizer does not allow it: %s", error)
        return None
