"""Finds the request of which instances die, so that no further instance gets it.

An instance may be lost because of a request, or with it. A request is *suspect* of each loss in
which it had got no token from that instance. The next connection shows what a loss was: an engine
that is back in the same life had not ended, because the connection broke or the machine stood
still, so the loss says nothing of any request and is taken back. An engine in another life had
ended.

When two losses in a row leave one request alone suspect of both, it is held: no instance gets it.
It is given up once both engines are known to have ended, and goes on once one of them is back. If
several are suspect, each is sent to an instance without another one of them, so that the next loss
tells them apart. A token clears a request of all suspicion.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from pla_serve.fleet.link.protocol import LossCause
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.routed_request import Loss, RoutedRequest
from pla_serve.wire.engine import Output

NOBODY: frozenset[str] = frozenset()
TOGETHER_SECONDS = 4.0
"""Instances that fall silent within so many seconds of each other do so together."""


class Suspects:
    """Knows the requests of which instances may have been lost, by `RoutedRequest.losses`.

    Args:
        most_lost_engines: so many engines may end with a request, without a token from them, before
            it is kept apart from others like it or given up.
        on_free: called when an instance may have another request that is kept apart.
    """

    def __init__(self, most_lost_engines: int, on_free: Callable[[], None]) -> None:
        self._most_lost_engines = most_lost_engines
        self._on_free = on_free
        self._apart: dict[str, str] = {}
        """Instances that have a request that is kept apart, and its id."""
        self._held: dict[str, RoutedRequest] = {}
        """Requests that no instance gets, by id."""
        self._open: dict[str, Loss] = {}
        """Losses whose engines may still be there, by the instance's name."""
        self._silent: dict[str, float] = {}
        """When each instance last fell silent, by its name."""

    def lost(
        self,
        instance: FleetInstance,
        requests: Sequence[RoutedRequest],
        cause: LossCause,
        now: float,
    ) -> None:
        """Note that an instance was lost with these requests."""
        self._apart.pop(instance.name, None)
        suspects = [one for one in requests if one.attempt is not None and not one.attempt.first]
        loss = Loss(instance.name, instance.boot, now, suspects, cause is LossCause.ENDED)
        if not loss.ended:
            self._open[instance.name] = loss
        if cause is LossCause.SILENT:
            self._silent[instance.name] = now
        apart = [one for one in suspects if one.lost_engines >= self._most_lost_engines]
        for request in suspects:
            request.losses.append(loss)
        accused = apart or [one for one in suspects if one.lost_engines >= self._most_lost_engines]
        if len(accused) == 1:
            self._held[accused[0].id] = accused[0]

    def returned(self, instance: FleetInstance) -> None:
        """Note that an instance is connected, which shows what its last loss was."""
        loss = self._open.pop(instance.name, None)
        if loss is None:
            return
        if instance.boot == loss.boot:
            self._take_back(loss)
        else:
            loss.ended = True

    def guilty(self) -> list[RoutedRequest]:
        """Return the requests that are to be given up."""
        return [
            request
            for request in self._held.values()
            if sum(loss.ended for loss in request.losses) >= self._most_lost_engines
        ]

    def kept_from(self, request: RoutedRequest) -> frozenset[str] | None:
        """Return the instances to which the request must not be sent now; None for all."""
        if request.lost_engines < self._most_lost_engines:
            return NOBODY
        if request.id in self._held:
            return None
        return frozenset(name for name, id in self._apart.items() if id != request.id)

    def sent(self, request: RoutedRequest, instance: FleetInstance) -> None:
        """Note that the request was sent there."""
        if request.lost_engines >= self._most_lost_engines:
            self._apart[instance.name] = request.id

    def cleared(self, request: RoutedRequest) -> None:
        """Note a token of the request, or its end: others may take its place."""
        request.losses.clear()
        self._free(request)

    def _take_back(self, loss: Loss) -> None:
        """Take a loss off the requests that are suspect of it: the engine is still there.

        It remains one of their failures, so that a request cannot make instances hang for ever,
        unless several instances fell silent together, which is the machine's doing.
        """
        together = self._silent.get(loss.name) == loss.at and any(
            name != loss.name and abs(at - loss.at) <= TOGETHER_SECONDS
            for name, at in self._silent.items()
        )
        for request in loss.requests:
            if loss not in request.losses:
                continue  # it has got a token since, or has ended
            request.losses.remove(loss)
            request.fruitless -= together
            if request.lost_engines < self._most_lost_engines:
                self._free(request)

    def _free(self, request: RoutedRequest) -> None:
        """Hold the request no longer, and keep it apart from no other."""
        self._held.pop(request.id, None)
        places = [name for name, id in self._apart.items() if id == request.id]
        for name in places:
            del self._apart[name]
        if places:
            self._on_free()


def given_up(request: RoutedRequest) -> Output:
    """Return the last message of a request that instances were lost of."""
    error = f"given up, because {request.lost_engines} instances ended with it"
    return Output(id=request.id, tokens=[], finish_reason="error", error=error, fault="request")


def log_failure(log: logging.Logger, request: RoutedRequest, reason: str) -> None:
    """Log why a request failed, with what its client is not told: which instances failed it."""
    before = f"; before that: {'; '.join(request.failures)}" if request.failures else ""
    extra = {"request_id": request.original.request_id or None}
    log.error("request %s failed: %s%s", request.id, reason, before, extra=extra)
