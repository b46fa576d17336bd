"""An observer that passes events on to metrics and to the pool controller."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pla_serve.fleet.link.protocol import InstanceReport, Link
from pla_serve.fleet.router.contract import RoutingObserver
from pla_serve.fleet.router.routed_request import Attempt

if TYPE_CHECKING:
    from pla_serve.fleet.control.control import FleetControl


class WithControl:
    """A `RoutingObserver` that also calls the pool controller with what that needs."""

    def __init__(self, metrics: RoutingObserver, control: FleetControl) -> None:
        self._control = control
        self.decided = metrics.decided
        self.moved = metrics.moved
        self.refused = metrics.refused
        self.handed_over = metrics.handed_over
        self._metrics = metrics

    def dispatched(self, instance: str, short: bool, seconds: float, now: float) -> None:
        self._metrics.dispatched(instance, short, seconds, now)
        self._control.dispatched(short, seconds, now)

    def began(
        self, attempt: Attempt, cached_tokens: int | None, lateness: float | None, now: float
    ) -> None:
        self._metrics.began(attempt, cached_tokens, lateness, now)
        if lateness is not None:
            self._control.first_token(attempt.instance.name, lateness)

    def reported(self, link: Link, report: InstanceReport) -> None:
        self._metrics.reported(link, report)
        self._control.report(link, report)

    def gone(self, link: Link) -> None:
        self._metrics.gone(link)
        self._control.lost(link)
