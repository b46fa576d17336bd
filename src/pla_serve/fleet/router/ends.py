"""Ends requests: takes them off all accounts, and tells their clients."""

from __future__ import annotations

import logging
from math import ceil, inf

import msgspec

from pla_serve.fleet.router.attempts import Attempts
from pla_serve.fleet.router.hand_overs import HandOvers
from pla_serve.fleet.router.keys import KeyShares
from pla_serve.fleet.router.moves import DecodeMoves
from pla_serve.fleet.router.parking import Parking
from pla_serve.fleet.router.routed_request import RoutedRequest
from pla_serve.fleet.router.suspects import Suspects, log_failure
from pla_serve.server.engine.session import EngineDiedError
from pla_serve.wire import engine as wire


class RequestEnds:
    """The one way in which a request ends, whatever the reason."""

    def __init__(
        self,
        requests: dict[str, RoutedRequest],
        parking: Parking,
        shares: KeyShares,
        attempts: Attempts,
        hand_overs: HandOvers,
        moves: DecodeMoves,
        suspects: Suspects,
        logger: logging.Logger,
    ) -> None:
        self._requests = requests
        self._parking = parking
        self._shares = shares
        self._attempts = attempts
        self._hand_overs = hand_overs
        self._moves = moves
        self._suspects = suspects
        self._log = logger

    def end(self, request: RoutedRequest) -> None:
        """Forget a request and everything that is charged for it."""
        self._requests.pop(request.id, None)
        self._moves.cancel(request)
        self._parking.leave(request)
        self._shares.discharge(request.tenant, request.id, self._attempts.clock())
        if request.attempt is not None:
            self._attempts.settle(request, request.attempt)
        self._suspects.cleared(request)

    def withdraw(self, request: RoutedRequest) -> None:
        """End a request, and tell the instances that have it."""
        attempt = request.attempt
        self._hand_overs.drop(request)
        self.end(request)
        if attempt is not None:
            self._attempts.send(attempt.instance, wire.AbortRequest(attempt.id))

    def fail(self, request: RoutedRequest, reason: str, *, answered: bool = False) -> None:
        """End a request with an error.

        Args:
            answered: an instance answered with an error.
        """
        self.withdraw(request)
        log_failure(self._log, request, reason)
        request.receiver.fail(EngineDiedError(reason, answered=answered))

    def at_fault(self, request: RoutedRequest, output: wire.Output) -> None:
        """End a request that failed by a fault of its own: no instance would do better."""
        self.withdraw(request)
        request.receiver.take(msgspec.structs.replace(output, id=request.id))

    def reject(self, request: RoutedRequest, rejected: wire.Rejected) -> None:
        """End a request as refused, or with an error if its client was told of acceptance."""
        if request.accepted:
            self.fail(request, rejected.reason)
            return
        self.end(request)
        request.receiver.take(msgspec.structs.replace(rejected, id=request.id))

    def refuse(self, request: RoutedRequest, reason: str, seconds: float) -> None:
        """End a request as refused, to be sent again after so many seconds."""
        retry_after = whole_seconds(seconds) if seconds < inf else 5.0
        self.reject(request, wire.Rejected(id=request.id, reason=reason, retry_after=retry_after))


def whole_seconds(seconds: float) -> float:
    """Return the seconds of a Retry-After: whole ones, at least one."""
    return float(ceil(max(seconds, 1.0)))
