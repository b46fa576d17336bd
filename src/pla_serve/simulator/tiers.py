"""Draws the tiers of simulated requests, and says whether promises were kept."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from pla_serve.policy.tiers import Tier, TierShare
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.traces.rows import Row, root


def draw_tiers(rows: Sequence[Row], shares: Sequence[TierShare], seed: int) -> list[Tier]:
    """Return a tier for each row; all rows of a session have one. Empty without shares.

    Args:
        shares: tiers and their weights.
    """
    if not shares:
        return []
    weights = np.array([each.share for each in shares])
    generator = np.random.default_rng([seed, len(shares)])
    drawn = generator.choice(len(shares), size=len(rows), p=weights / weights.sum())
    sessions: dict[str, int] = {}
    found = []
    for row, own in zip(rows, drawn, strict=True):
        number = int(own)
        if row.session is not None:
            number = sessions.setdefault(root(row.session), number)
        found.append(shares[number].tier)
    return found


def kept_promise(job: SimulatedRequest, tier: Tier) -> bool:
    """Return whether all tokens of a request came by the deadlines that its tier promises.

    Without a TTFT target they are counted from the first token.
    """
    first = job.ttft if tier.ttft is None else tier.ttft
    return job.in_time(first, inf if tier.tpot is None else tier.tpot)
