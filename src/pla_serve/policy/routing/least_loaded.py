"""To the instance with the least in hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.request import RouteRequest
from pla_serve.policy.routing.view import FleetView


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Blind to caches. Of equals, the one that was given the fewest new tokens so far.

    Raises:
        ValueError: ``by`` is neither of its two values.
    """

    by: Literal["requests", "tokens"] = "requests"
    """Requests that are not finished, or new tokens that are not prefilled."""

    def __post_init__(self) -> None:
        if self.by not in ("requests", "tokens"):
            raise ValueError(f"by must be requests or tokens, not {self.by!r}")

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """The least loaded member."""
        ties = view.ties(view.requests if self.by == "requests" else view.tokens, pool)
        if len(ties) == 1:
            return int(ties[0])
        return int(ties[view.assigned[ties].argmin()])
