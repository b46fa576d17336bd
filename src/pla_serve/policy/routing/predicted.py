"""To the instance that is predicted to give the first token soonest, others considered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pla_serve.policy.declare import Kind, itself
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.policy.routing.request import RouteRequest
from pla_serve.policy.routing.router import placement
from pla_serve.policy.routing.view import FleetView


@dataclass(frozen=True, slots=True)
class Predicted:
    """Seconds to first token = work queued there + prefill of what it lacks + KV fetched.

    Whoever minimises that for each request alone computes cached prefixes again elsewhere just when
    there is no time for it. A second of work also delays those who come behind it: those who wait,
    and about as many who come before the queue is empty. So the request's own seconds count
    ``1 + others * w`` times, with w the mean number of requests that wait on an instance. On an
    idle fleet the cost is the time to first token. A request that would miss its deadline that way
    goes where its first token is soonest.

    Only instances that hold some of the prompt differ in the request's own seconds, so that one
    look at all (the soonest to begin) and one at each holder find the best of a thousand. Of equals
    a holder is taken.

    Raises:
        ValueError: ``others`` is negative or not finite.
    """

    others: Annotated[
        float,
        Knob(
            "Weight of the delay of others; at 0 each request goes where its own first token is "
            "soonest.",
            least=0,
        ),
    ] = 2.0

    def __post_init__(self) -> None:
        check_knobs(self)

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """The member with the least cost."""
        soonest = view.soonest(self._short_without_cache(request, view), pool, now)
        if not request.cached:
            return soonest
        holders = [index for index, _ in view.holders(request, pool)]
        best = min((*holders, soonest), key=lambda index: self.cost(request, view, index, now))
        if request.deadline is not None:
            return self._in_time(request, view, (best, *holders, soonest), now)
        return best

    def cost(self, request: RouteRequest, view: FleetView, index: int, now: float) -> float:
        """Predicted seconds to first token on one instance, and those that others lose."""
        place = placement(request, view, view.entries[index].id)
        wait = view.wait(index, view.is_short(request, place.new_tokens), now)
        return wait + place.seconds * (1 + self.others * view.waiting / len(view))

    def _in_time(
        self, request: RouteRequest, view: FleetView, members: tuple[int, ...], now: float
    ) -> int:
        """The first of ``members``, unless it is too late there: then the soonest of them."""
        alone = Predicted(others=0.0)
        assert request.deadline is not None
        if now + alone.cost(request, view, members[0], now) <= request.deadline:
            return members[0]
        return min(members, key=lambda index: alone.cost(request, view, index, now))

    def _short_without_cache(self, request: RouteRequest, view: FleetView) -> bool:
        """The class it has where no more of it is cached than everywhere."""
        if request.cached and view.model.transfer_seconds is not None:
            return view.is_short(request, placement(request, view, None).new_tokens)
        return view.is_short(request, request.prompt_tokens - request.common)


ROUTING: Kind[RoutingPolicy] = Kind(
    name="predicted",
    summary="soonest predicted first token",
    make=itself,
    options=Predicted,
)
