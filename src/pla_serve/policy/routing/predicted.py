"""To the instance that is predicted to give the first token soonest."""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.protocol import RouteRequest
from pla_serve.policy.routing.router import placement
from pla_serve.policy.routing.view import FleetView


@dataclass(frozen=True, slots=True)
class Predicted:
    """Seconds to first token = work queued there + prefill of what it lacks + KV fetched.

    Only instances that hold some of the prompt differ in the second part, so that one look at all
    (the soonest to begin) and one at each holder find the best of a thousand. Of equals a holder
    is taken, so that prefixes are not copied without need.
    """

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """The member with the least predicted time to first token."""
        holders = [index for index, _ in view.holders(request, pool)] if request.cached else []
        if not holders:
            return view.soonest(self._short_without_cache(request, view), pool, now)
        elsewhere = view.soonest(self._short_without_cache(request, view), pool, now)
        return min((*holders, elsewhere), key=lambda index: self.seconds(request, view, index, now))

    def seconds(self, request: RouteRequest, view: FleetView, index: int, now: float) -> float:
        """Predicted time to first token on one instance."""
        place = placement(request, view, view.entries[index].id)
        return view.wait(index, view.is_short(place.new_tokens), now) + place.seconds

    def _short_without_cache(self, request: RouteRequest, view: FleetView) -> bool:
        """The class it has where no more of it is cached than everywhere."""
        if request.cached and view.model.transfer_seconds is not None:
            return view.is_short(placement(request, view, None).new_tokens)
        return view.is_short(request.prompt_tokens - request.common)
