"""The contract of routing policies: a request as numbers in, an instance out."""

from __future__ import annotations

from typing import Protocol

from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.request import RouteRequest
from pla_serve.policy.routing.view import FleetView


class RoutingPolicy(Protocol):
    """Chooses. All it may remember are its own turns; what is known of the fleet is in the view."""

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """An index into ``view``, among the members of ``pool`` (None: among all).

        The pool has members; `Router` sees to it.
        """
        ...
