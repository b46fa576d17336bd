"""Tiers of a workload's sessions, and whether a promise was kept."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

from pla_serve.bench.client import TimedRequest
from pla_serve.policy.tiers import Tier, TierShare


def draw_tier(shares: Sequence[TierShare], session: int) -> Tier | None:
    """Return the tier of a session, the same in every run; None where there are none."""
    if not shares:
        return None
    weights = [each.share for each in shares]
    return random.Random(f"session {session}").choices(shares, weights)[0].tier


def kept(exchange: TimedRequest, ttft: float | None, tier: Tier) -> bool:
    """Whether all tokens of an answer came by their deadlines.

    Token i is due i TPOT targets after the first one, which is due at the TTFT target; without one
    they are counted from the first token.

    Args:
        ttft: seconds from the time at which the request was due to its first token, or None.
    """
    if exchange.error is not None or exchange.done is None or ttft is None:
        return False
    due = ttft if tier.ttft is None else tier.ttft
    if ttft > due or tier.tpot is None:
        return ttft <= due
    came = accumulate(exchange.gaps, initial=ttft)
    return all(time <= due + number * tier.tpot for number, time in enumerate(came))
