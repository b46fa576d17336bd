"""To the instance with the least in hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pla_serve.policy.declare import Kind, itself
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.policy.routing.request import RouteRequest
from pla_serve.policy.routing.view import FleetView


@dataclass(frozen=True, slots=True)
class LeastLoaded:
    """Blind to caches. Of equals, the one that was given the fewest new tokens so far.

    Raises:
        ValueError: ``by`` is neither of its two values.
    """

    by: Annotated[
        Literal["requests", "tokens"],
        Knob("Load in requests that are not finished, or in new tokens that are not prefilled."),
    ] = "requests"

    def __post_init__(self) -> None:
        check_knobs(self)

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """The least loaded member."""
        ties = view.ties(view.requests if self.by == "requests" else view.tokens, pool)
        if len(ties) == 1:
            return int(ties[0])
        return int(ties[view.assigned[ties].argmin()])


ROUTING: Kind[RoutingPolicy] = Kind(
    name="least-loaded",
    summary="fewest requests or tokens in hand",
    make=itself,
    options=LeastLoaded,
)
