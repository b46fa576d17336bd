"""One after another."""

from __future__ import annotations

import numpy as np

from pla_serve.policy.declare import Kind
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.policy.routing.request import RouteRequest
from pla_serve.policy.routing.view import FleetView


class RoundRobin:
    """Blind to load and caches; each pool has a turn of its own."""

    def __init__(self) -> None:
        self._last: dict[Pool | None, int] = {}

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """The member after the last one chosen. If instances leave, one may be skipped once."""
        after = self._last.get(pool, -1) + 1
        if pool is None:
            index = after if after < len(view) else 0
        else:
            members = view.members(pool)
            index = int(members[int(np.searchsorted(members, after)) % len(members)])
        self._last[pool] = index
        return index


ROUTING: Kind[RoutingPolicy] = Kind(
    name="round-robin", summary="one instance after another", make=RoundRobin
)
