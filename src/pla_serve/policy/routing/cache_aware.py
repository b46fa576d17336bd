"""Cached prefixes first, unless loads differ too much: as SGLang's router decides.

After ``sgl-router/src/policies/cache_aware.rs`` of sgl-project/sglang; the default thresholds are
those of its launcher (``--cache-threshold 0.3 --balance-abs-threshold 64
--balance-rel-threshold 1.5``).
"""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.request import RouteRequest
from pla_serve.policy.routing.view import FleetView


@dataclass(frozen=True, slots=True)
class CacheAware:
    """The load of an instance is its number of unfinished requests.

    1. If ``max - min > balance_abs`` and ``max > balance_rel * min``: the least loaded.
    2. Else, if some instance holds more than ``cache_threshold`` of the prompt: the one that holds
       most (the original takes any of equals, here the least loaded).
    3. Else the one with the smallest cache. The original measures its own record of what it sent
       there; so does this (`FleetView.assigned`), without the record's eviction.

    Raises:
        ValueError: a threshold is out of range.
    """

    cache_threshold: float = 0.3
    """Share of the prompt, 0 to 1."""
    balance_abs: int = 64
    """Requests."""
    balance_rel: float = 1.5
    """Factor."""

    def __post_init__(self) -> None:
        if not 0 <= self.cache_threshold <= 1:
            raise ValueError(f"cache_threshold must lie in 0..1, not {self.cache_threshold}")
        if self.balance_abs < 0:
            raise ValueError(f"balance_abs must be at least 0, not {self.balance_abs}")
        if not self.balance_rel >= 1:
            raise ValueError(f"balance_rel must be at least 1, not {self.balance_rel}")

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """By the three steps above."""
        loads = view.requests if pool is None else view.requests[view.members(pool)]
        most, least = int(loads.max()), int(loads.min())
        if most - least > self.balance_abs and most > self.balance_rel * least:
            return view.least(view.requests, pool)
        best = max(
            view.holders(request, pool),
            key=lambda item: (item[1], -int(view.requests[item[0]])),
            default=None,
        )
        enough = self.cache_threshold * request.prompt_tokens
        if best is not None and best[1] > enough:
            return best[0]
        if request.common > enough:
            return view.least(view.requests, pool)
        return view.least(view.assigned, pool)
