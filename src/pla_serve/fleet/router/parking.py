"""Requests that no instance takes just now."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pla_serve.fleet.router.contract import Later
from pla_serve.fleet.router.routed_request import RoutedRequest


class Parking:
    """They are placed again when their time has come, or when the fleet has changed."""

    def __init__(self, later: Later, place: Callable[[RoutedRequest], None]) -> None:
        self._later = later
        self._place = place
        self._parked: dict[str, RoutedRequest] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def __iter__(self) -> Iterator[RoutedRequest]:
        return iter(list(self._parked.values()))

    def park(self, request: RoutedRequest, seconds: float) -> None:
        """Try again after so long."""

        def wake() -> None:
            request.timer = None
            request.refused.clear()
            self._place(request)

        self._parked[request.id] = request
        request.timer = self._later(seconds, wake)

    def leave(self, request: RoutedRequest) -> None:
        """It is placed, or has ended; unknown ones are ignored."""
        self._parked.pop(request.id, None)
        if request.timer is not None:
            request.timer.cancel()
            request.timer = None

    def wake_all(self) -> None:
        """Place all now, in the order in which they came."""
        for request in self:
            if request.id in self._parked:
                self._place(request)
