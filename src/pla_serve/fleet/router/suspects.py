"""Finds the request that instances die of, so that it does not get another one.

An instance may be lost because of a request, or with it. A request is *suspect* of each loss in
which it had got no token from that instance. When two losses in a row leave one request alone
suspect of both, it is given up. If several are, each is sent to an instance without another one of
them, so that the next loss tells them apart; a token clears a request of all suspicion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.routed_request import RoutedRequest
from pla_serve.wire.engine import Output


class Suspects:
    """Which requests may be what instances were lost of. Notes losses in `RoutedRequest.losses`.

    Args:
        most_lives: so many engines may end with a request, without a token from them, before it is
            kept apart from others like it or given up.
        on_free: called when an instance may have another request that is kept apart.
    """

    def __init__(self, most_lives: int, on_free: Callable[[], None]) -> None:
        self._most_lives = most_lives
        self._on_free = on_free
        self._apart: dict[str, str] = {}
        """Instances that have a request that is kept apart, and its id."""

    def lost(
        self, instance: FleetInstance, requests: Sequence[RoutedRequest]
    ) -> RoutedRequest | None:
        """Note that an instance was lost with these requests; returns the one to be given up."""
        self._apart.pop(instance.name, None)
        suspects = [one for one in requests if one.attempt is not None and not one.attempt.first]
        apart = [one for one in suspects if one.lives >= self._most_lives]
        for request in suspects:
            request.losses.append((instance, instance.boot))
        accused = apart or [one for one in suspects if one.lives >= self._most_lives]
        return accused[0] if len(accused) == 1 else None

    def kept_from(self, request: RoutedRequest) -> frozenset[str]:
        """Instances to which the request must not be sent now."""
        if request.lives < self._most_lives:
            return frozenset()
        return frozenset(name for name, id in self._apart.items() if id != request.id)

    def sent(self, request: RoutedRequest, instance: FleetInstance) -> None:
        """Note that the request was sent there."""
        if request.lives >= self._most_lives:
            self._apart[instance.name] = request.id

    def cleared(self, request: RoutedRequest) -> None:
        """Note a token of the request, or its end: others may take its place."""
        request.losses.clear()
        held = [name for name, id in self._apart.items() if id == request.id]
        for name in held:
            del self._apart[name]
        if held:
            self._on_free()


def given_up(request: RoutedRequest, reason: str) -> Output:
    """Return the last message of a request that instances were lost of."""
    causes = "; ".join([*request.failures, reason])
    error = f"given up, because {request.lives} instances ended with it: {causes}"
    return Output(id=request.id, tokens=[], finish_reason="error", error=error, fault="request")
