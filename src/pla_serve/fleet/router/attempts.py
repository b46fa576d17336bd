"""Charges requests to instances, sends messages there, and settles the accounts."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from pla_serve.fleet.link.protocol import LinkDown
from pla_serve.fleet.router.dispatch import Dispatcher, DispatchPlan
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.routed_request import Attempt, RoutedRequest


class Attempts:
    """Keeps the accounts of an attempt together: dispatcher, circuit, names on the instance."""

    def __init__(self, dispatcher: Dispatcher, clock: Callable[[], float]) -> None:
        self._dispatcher = dispatcher
        self.clock = clock

    def open(self, request: RoutedRequest, plan: DispatchPlan, now: float) -> Attempt:
        """Begin an attempt: charge the request to the planned instance.

        From now on messages of the instance under the attempt's id belong to the request. If the
        circuit is not closed, this attempt is its probe.
        """
        attempt = self._dispatcher.charge(request, plan, now)
        attempt.instance.attempts[attempt.id] = request.id
        attempt.instance.circuit.sent(attempt.id)
        return attempt

    def settle(self, request: RoutedRequest, attempt: Attempt) -> None:
        """End an attempt and take it off all accounts.

        If it was a probe that showed nothing, another attempt may be one.
        """
        attempt.instance.attempts.pop(attempt.id, None)
        attempt.instance.circuit.withdrawn(attempt.id)
        self._dispatcher.finished(attempt, self.clock())
        if request.attempt is attempt:
            request.attempt = None

    def send(self, instance: FleetInstance, message: msgspec.Struct) -> bool:
        """Send a message to an instance; return False if there is no connection.

        The link reports the loss of a connection by itself.
        """
        if not instance.connected:
            return False
        try:
            instance.link.send(message)  # type: ignore[arg-type]
        except LinkDown:
            return False
        return True
