"""Places requests on instances and keeps their accounts, whatever the policy."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.policy.routing.request import FleetModel, NoInstance, RouteRequest
from pla_serve.policy.routing.view import Charge, FleetView


class Placement(NamedTuple):
    """Work that a request brings to one instance."""

    new_tokens: int
    """To compute there."""
    history: int
    """Cached there, or fetched."""
    fetch_from: str | None
    """The instance that sends KV, or None."""
    fetch_tokens: int
    seconds: float
    """Predicted, for fetching and computing; waiting not counted."""


class Router:
    """One per fleet, or per stage of it (prefill, decode).

    Life of a request: `choose` and `dispatched`, then `prefilled` with its first token and
    `finished` with its last, or `finished` alone if it was aborted. All times are seconds on the
    caller's clock. Ids that are not known are ignored where a late message may bring them.
    """

    def __init__(self, policy: RoutingPolicy, model: FleetModel) -> None:
        self.view = FleetView(model)
        self._policy = policy
        self._charges: dict[str, Charge] = {}

    def added(self, instance_id: str, pool: Pool, now: float) -> None:
        """An instance is ready to take requests.

        Raises:
            ValueError: it was added before and not removed.
        """
        if instance_id in self.view:
            raise ValueError(f"instance {instance_id!r} was added before; remove it first")
        self.view.join(instance_id, pool, now)

    def moved(self, instance_id: str, pool: Pool) -> None:
        """Move an instance to ``pool``. The requests that it has stay on its account.

        Raises:
            KeyError: it is not known.
        """
        self.view.change_pool(self.view.entry(instance_id), pool)

    def removed(self, instance_id: str) -> list[str]:
        """An instance takes no more requests, or died.

        Returns:
            Ids of the requests that it held, in order of dispatch.


        Raises:
            KeyError: it is not known.
        """
        entry = self.view.entry(instance_id)
        self.view.leave(entry)
        held = [*sorted(entry.running), *entry.waiting]
        for request_id in held:
            del self._charges[request_id]
        return held

    def choose(
        self, request: RouteRequest, now: float, exclude: Collection[str] = frozenset()
    ) -> str:
        """The instance for a request, none of ``exclude``; nothing is charged yet.

        Raises:
            NoInstance: there is none.
        """
        view = self.view.without(exclude) if exclude else self.view
        if not view.entries:
            raise NoInstance("no instance is ready; add one, or wait until one has started")
        return view.entries[self._policy.choose(request, view, None, now)].id

    def place(self, request: RouteRequest, instance_id: str) -> Placement:
        """Work that the request brings to this instance; KV is fetched where that is faster.

        Raises:
            KeyError: the instance is not known.
        """
        return placement(request, self.view, self.view.entry(instance_id).id)

    def dispatched(self, request: RouteRequest, instance_id: str, now: float) -> Placement:
        """Charge the work of a request that was sent to an instance.

        Raises:
            KeyError: the instance is not known.
            ValueError: the request is dispatched already.
        """
        if request.id in self._charges:
            raise ValueError(f"request {request.id!r} is dispatched already; finish it first")
        entry = self.view.entry(instance_id)
        place = placement(request, self.view, instance_id)
        short = self.view.is_short(request, place.new_tokens)
        seconds = place.seconds
        if short and entry.waiting:
            seconds = max(0.0, seconds - self.view.model.launch_seconds)
        charge = Charge(entry, place.new_tokens, seconds, short, now)
        self._charges[request.id] = charge
        self.view.charge(entry, request.id, charge)
        return place

    def charged(self, request_id: str) -> Charge:
        """The account of a request that is dispatched and not finished.

        Raises:
            KeyError: there is none.
        """
        return self._charges[request_id]

    def prefilled(self, request_id: str, now: float) -> None:
        """Take the prefill of a request that has its first token off its account."""
        charge = self._charges.get(request_id)
        if charge is not None and charge.entry.waiting.pop(request_id, None) is not None:
            charge.entry.running.add(request_id)
            self.view.discharge(charge.entry, charge, now)

    def finished(self, request_id: str, now: float) -> None:
        """Take a request that has all its tokens, or was aborted, off its account."""
        charge = self._charges.pop(request_id, None)
        if charge is None:
            return
        entry = charge.entry
        self.view.requests[entry.index] -= 1
        if entry.waiting.pop(request_id, None) is not None:
            self.view.discharge(entry, charge, now)
        else:
            entry.running.discard(request_id)

    def reported(
        self, instance_id: str, queued_seconds: float, short_seconds: float, at: float
    ) -> None:
        """Take in what an instance predicted at ``at``: seconds of prefill before it, and the short
        part of them. Requests that were dispatched later are added."""
        if instance_id in self.view:
            self.view.correct(self.view.entry(instance_id), queued_seconds, short_seconds, at)


def placement(request: RouteRequest, view: FleetView, instance_id: str | None) -> Placement:
    """Work that ``request`` brings to an instance; None is one that caches no more than all do."""
    prompt = request.prompt_tokens
    here = request.common
    if instance_id is not None and request.cached:
        here = max(here, request.cached.get(instance_id, 0))
    here = min(here, prompt - 1)
    model = view.model
    alone = model.prefill_seconds(prompt - here, here)
    if model.transfer_seconds is not None and request.cached:
        source, cached = max(
            ((k, min(c, prompt - 1)) for k, c in request.cached.items() if k in view),
            key=lambda item: item[1],
            default=(None, here),
        )
        if cached > here:
            fetched = model.transfer_seconds(cached - here)
            fetched += model.prefill_seconds(prompt - cached, cached)
            if fetched < alone:
                return Placement(prompt - cached, cached, source, cached - here, fetched)
    return Placement(prompt - here, here, None, 0, alone)
