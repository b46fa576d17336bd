"""Cached prefixes first, unless loads differ too much: as SGLang's router decides.

After ``sgl-router/src/policies/cache_aware.rs`` of sgl-project/sglang; the default thresholds are
those of its launcher (``--cache-threshold 0.3 --balance-abs-threshold 64
--balance-rel-threshold 1.5``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pla_serve.policy.declare import Kind, itself
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.protocol import RoutingPolicy
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

    cache_threshold: Annotated[
        float,
        Knob("Share of the prompt that an instance must hold to be preferred.", least=0, most=1),
    ] = 0.3
    balance_abs: Annotated[
        int,
        Knob(
            "Difference between the most and the least loaded instance up to which caches decide.",
            unit="requests",
            least=0,
        ),
    ] = 64
    balance_rel: Annotated[
        float,
        Knob(
            "Ratio of the most to the least loaded instance up to which caches decide.",
            least=1,
            finite=False,
        ),
    ] = 1.5

    def __post_init__(self) -> None:
        check_knobs(self)

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """Choose by the three steps of the class."""
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


ROUTING: Kind[RoutingPolicy] = Kind(
    name="cache-aware",
    summary="cached prefixes first, as in SGLang's router",
    make=itself,
    options=CacheAware,
)
