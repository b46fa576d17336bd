"""Keeps the requests that no instance takes just now."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pla_serve.fleet.router.contract import Later
from pla_serve.fleet.router.routed_request import RoutedRequest


class Parking:
    """Parked requests, which are placed again after a while or when the fleet has changed."""

    def __init__(self, later: Later, place: Callable[[RoutedRequest], None]) -> None:
        self._later = later
        self._place = place
        self._parked: dict[str, RoutedRequest] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def __iter__(self) -> Iterator[RoutedRequest]:
        return iter(list(self._parked.values()))

    def park(self, request: RoutedRequest, seconds: float) -> None:
        """Keep a request and place it again after so many seconds."""

        def wake() -> None:
            request.timer = None
            request.refused.clear()
            self._place(request)

        self._parked[request.id] = request
        request.timer = self._later(seconds, wake)

    def leave(self, request: RoutedRequest) -> None:
        """Forget a request that is placed or has ended; unknown ones are ignored."""
        self._parked.pop(request.id, None)
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None

    def wake_all(self) -> None:
        """Place all requests now, in the order in which they were parked."""
        for request in self:
            if request.id in self._parked:
                self._place(request)
