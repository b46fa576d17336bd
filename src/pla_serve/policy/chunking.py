"""Sizes of the chunks in which a long prefill is computed."""

from __future__ import annotations

from math import ceil, floor, inf, sqrt

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.tuning import Tuning


def efficient_chunk(profile: CostProfile, history: int, overhead: float) -> float:
    """The fewest tokens of which a pass costs at most ``overhead`` more than its tokens do.

    A pass pays the launch (the weights are read) and the reading of the history however small it
    is, ``fixed``; each token adds ``slope``. Their shares meet where
    ``fixed = overhead * (fixed + slope * tokens)``. More history makes both grow, so that chunks
    stay about as long in seconds.

    Returns:
        Tokens, at least 1; infinite if tokens cost nothing.

    Raises:
        ValueError: ``overhead`` does not lie between 0 and 1.
    """
    if not 0 < overhead < 1:
        raise ValueError(f"overhead must lie between 0 and 1, not {overhead}")
    fixed = profile.per_launch + profile.per_sequence + profile.per_kv * history
    slope = profile.per_token + profile.per_kv + profile.per_attention * history
    if slope == 0:
        return inf
    return max(1, ceil(fixed * (1 - overhead) / (overhead * slope)))


def timed_chunk(profile: CostProfile, history: int, seconds: float) -> float:
    """The most tokens of which one pass takes at most ``seconds``; 0 if even the launch does not.

    With n new tokens on H cached ones a pass takes
    ``fixed + per_kv * H + (per_token + per_kv + per_attention * H) * n + per_attention * n^2 / 2``.

    Returns:
        A whole number of tokens; infinite if ``seconds`` is, or if tokens cost nothing.
    """
    left = seconds - profile.per_launch - profile.per_sequence - profile.per_kv * history
    if left <= 0:
        return 0
    half, slope = profile.per_attention / 2, profile.per_token + profile.per_kv
    slope += profile.per_attention * history
    if seconds == inf or (slope == 0 and half == 0):
        return inf
    return floor(2 * left / (slope + sqrt(slope * slope + 4 * half * left)))


def long_chunk(
    config: PolicyConfig, cost: CostModel, tuning: Tuning, history: int, load: float
) -> float:
    """Return the tokens of a chunk of a long prefill, beside which nothing is due.

    Args:
        history: cached tokens of the prefill.
        load: work that arrives, in seconds a second.
    """
    profile = cost.profile
    if not config.interruptible:
        spare = tuning.stiff_share * (1 - load)
        overhead = min(tuning.stiff_most, max(tuning.stiff_least, spare))
    else:
        overhead = tuning.overhead
    tokens = efficient_chunk(profile, history, overhead)
    if config.interruptible and config.layers is not None:
        layer = tuning.layer_share * cost.prefill_seconds(tuning.typical_short, 0)
        quick = timed_chunk(profile, history, config.layers * layer)
        least = efficient_chunk(profile, history, tuning.overhead_for_layers)
        tokens = min(tokens, max(quick, least))
    return max(tuning.least_chunk, tokens)
