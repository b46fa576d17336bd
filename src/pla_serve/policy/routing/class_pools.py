"""Short and long requests on instances of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Annotated

from pla_serve.policy.declare import Kind, itself
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.predicted import Predicted
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.policy.routing.request import RouteRequest
from pla_serve.policy.routing.view import FleetView


def _other_routing(text: str) -> RoutingPolicy:
    """Read the knob ``inner``."""
    from pla_serve.policy.routing.registry import parse_routing  # which imports this module

    if text == "class-pools":
        raise ValueError(f"knob inner of routing class-pools is another routing, not {text!r}")
    return parse_routing(text)


@dataclass(frozen=True, slots=True)
class ClassPools:
    """Spatial disaggregation (PLA-Serve, arXiv 2601.11589), with an overflow.

    A request is short if some short instance, with what it has cached, would compute no more than
    the boundary; where KV can be fetched, with what any instance has cached. The policy ``inner``
    chooses within the pool. If the request would wait there for longer than ``overflow_seconds``
    while the other pool idles, it goes there; long ones leave ``reserve`` idle instances to shorts.

    Raises:
        ValueError: a field is out of range.
    """

    inner: Annotated[
        RoutingPolicy,
        Knob("Name of the routing that chooses within a pool.", read=_other_routing),
    ] = field(default_factory=Predicted)
    overflow_seconds: Annotated[
        float,
        Knob(
            "Predicted wait in its own pool from which on a request may go to an idle instance of "
            "the other; inf keeps the pools strictly apart, as published.",
            unit="seconds",
            least=0,
            finite=False,
        ),
    ] = 0.0
    reserve: Annotated[
        int,
        Knob("Idle short instances that long requests leave alone.", unit="instances", least=0),
    ] = 1

    def __post_init__(self) -> None:
        check_knobs(self)

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """An instance of its class, or an idle one of the other; ``pool`` overrides the class."""
        own = pool or self.pool_of(request, view)
        other = Pool.LONG if own is Pool.SHORT else Pool.SHORT
        if not view.count(own):
            return self.inner.choose(request, view, other if view.count(other) else None, now)
        index = self.inner.choose(request, view, own, now)
        if self.overflow_seconds == inf or not view.count(other):
            return index
        if view.wait(index, own is Pool.SHORT, now) <= self.overflow_seconds:
            return index
        idle = view.idle(other, now)
        if len(idle) <= (self.reserve if own is Pool.LONG else 0):
            return index
        return int(idle[view.ready[idle].argmin()])

    def pool_of(self, request: RouteRequest, view: FleetView) -> Pool:
        """The class of a request, as the caches stand."""
        if view.is_short(request, request.prompt_tokens - request.common):
            return Pool.SHORT
        where = Pool.SHORT if view.model.transfer_seconds is None else None
        new = request.prompt_tokens - view.most_cached(request, where)
        return Pool.SHORT if view.is_short(request, new) else Pool.LONG


ROUTING: Kind[RoutingPolicy] = Kind(
    name="class-pools",
    summary="short and long requests on instances of their own, with an overflow",
    make=itself,
    options=ClassPools,
)
