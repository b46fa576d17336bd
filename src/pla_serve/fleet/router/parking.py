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

    def park(self, flight: RoutedRequest, seconds: float) -> None:
        """Try again after so long."""

        def wake() -> None:
            flight.timer = None
            flight.refused.clear()
            self._place(flight)

        self._parked[flight.request.id] = flight
        flight.timer = self._later(seconds, wake)

    def leave(self, flight: RoutedRequest) -> None:
        """It is placed, or has ended; unknown ones are ignored."""
        self._parked.pop(flight.request.id, None)
        if flight.timer is not None:
            flight.timer.cancel()
            flight.timer = None

    def wake_all(self) -> None:
        """Place all now, in the order in which they came."""
        for flight in self:
            if flight.request.id in self._parked:
                self._place(flight)
