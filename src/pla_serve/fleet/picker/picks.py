"""Decides for requests that do not pass through this process, and keeps their accounts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count

from pla_serve.fleet.picker.prompts import PickedPrompt
from pla_serve.fleet.router.attempts import Attempts
from pla_serve.fleet.router.contract import Later
from pla_serve.fleet.router.dispatch import DispatchPlan
from pla_serve.fleet.router.ends import whole_seconds
from pla_serve.fleet.router.fleet import Fleet
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.prefixes import Chain
from pla_serve.fleet.router.routed_request import Attempt, RoutedRequest, Timer
from pla_serve.wire.engine import AddRequest, RequestAnswer, SamplingParams

MOST_CHAINED = 2**19
"""Leading tokens of a request that are compared with what instances have cached. A request of many
prompts may have millions, and hashing them all would hold the event loop."""
SAMPLING = SamplingParams(max_tokens=1, temperature=0)
RETRY_SECONDS = 5.0
"""Seconds after which a client may come back if no instance is ready."""


class NoPick(Exception):
    """No instance may have the request now.

    Args:
        status: 429, the fleet has more work than this API key may add to; 503, no instance is open.
        retry_after: seconds after which it may be different.
    """

    def __init__(self, status: int, reason: str, retry_after: float) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.retry_after = whole_seconds(retry_after)


@dataclass(slots=True, eq=False)
class Pick:
    """A request that was sent to an instance, until `Picks.end`."""

    instance: FleetInstance
    request: RoutedRequest
    attempt: Attempt | None
    """The account of the request on its instance; None if it has no prompt to be charged for."""
    timer: Timer | None = None
    """Ends the prefill's time on the account."""
    status: int | None = None
    """HTTP status of the answer, once its head has come."""


class Picks:
    """Chooses instances with the fleet's dispatcher, and charges them.

    Nobody tells the picker of first tokens: an answer's head comes before them and its body passes
    by. So a prefill stays on the account for as long as it was predicted to wait and to take, or
    until the answer ends. Between two reports of an instance that is how long it takes; a report
    takes the place of all that was charged before it.

    All methods belong to the fleet's event loop.

    Args:
        fleet: its dispatcher decides; its observer is told of decisions.
        later: calls a function after some seconds of the fleet's clock.
        timer: measures decisions, in seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        later: Later,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._fleet = fleet
        self._later = later
        self._timer = timer
        self._attempts = Attempts(fleet.dispatcher, fleet.clock)
        self._numbers = count()
        self.in_flight = 0
        """Requests that were picked for and have not ended."""

    def pick(self, prompt: PickedPrompt | None, allowed: Collection[str] | None = None) -> Pick:
        """Choose an instance for a request and charge it. `end` must follow.

        Args:
            prompt: None for a request without one, which is charged to nobody.
            allowed: names of the instances that may have it; None: all.

        Raises:
            NoPick: none of them may have it.
        """
        fleet, now, began = self._fleet, self._fleet.clock(), self._timer()
        request = self._request(prompt, now)
        names = frozenset(each.name for each in fleet.instances)
        kept_from = names.difference(names if allowed is None else allowed)
        plan = fleet.dispatcher.plan(request, request.id, now, kept_from)
        fleet.observer.decided(self._timer() - began)
        if plan is None:
            fleet.observer.refused("capacity")
            raise NoPick(503, "no instance is ready", RETRY_SECONDS)
        if prompt is None:
            self.in_flight += 1
            return Pick(plan.instance, request, None)
        refusal = fleet.beyond_share(prompt.tenant, plan, now)
        if refusal is not None:
            raise NoPick(429, *refusal)
        return self._charged(request, plan, now)

    def answered(self, pick: Pick, status: int) -> None:
        """Note the status of the answer: an instance that fails often gets nothing for a while."""
        attempt = pick.attempt
        if pick.status is not None or attempt is None:
            return
        pick.status = status
        circuit = pick.instance.circuit
        if status >= 500:
            circuit.failed(self._fleet.clock())
        else:
            circuit.succeeded()
        if pick.instance.connected:
            self._fleet.dispatcher.note(pick.instance)

    def end(self, pick: Pick) -> None:
        """Take a request off its account: it was answered, or its client is gone."""
        self.in_flight -= 1
        if pick.timer is not None:
            pick.timer.cancel()
        if pick.attempt is None:
            return
        if pick.status is not None and pick.status < 400:
            self._prefilled(pick)
        fleet, request = self._fleet, pick.request
        fleet.shares.discharge(request.tenant, request.id, fleet.clock())
        self._attempts.settle(request, pick.attempt)

    def _request(self, prompt: PickedPrompt | None, now: float) -> RoutedRequest:
        tokens = [0] if prompt is None else prompt.tokens
        scope = "" if prompt is None else prompt.cache_scope
        slo = None if prompt is None else prompt.ttft_slo
        added = AddRequest(
            id=f"pick-{next(self._numbers)}",
            prompt=tokens,
            sampling=SAMPLING,
            arrival=now,
            deadline=None if slo is None else now + slo,
        )
        tenant = "" if prompt is None else prompt.tenant
        return RoutedRequest(added, _NOBODY, tenant, Chain(tokens[:MOST_CHAINED], scope))

    def _charged(self, request: RoutedRequest, plan: DispatchPlan, now: float) -> Pick:
        fleet = self._fleet
        attempt = request.attempt = self._attempts.open(request, plan, now)
        attempt.alone = None  # nothing is learnt from the time of a first token that is not seen
        fleet.shares.charge(request.tenant, request.id, plan.place.seconds, now)
        fleet.observer.dispatched(plan.instance.name, plan.short, plan.place.seconds, now)
        pick = Pick(plan.instance, request, attempt)
        pick.timer = self._later(attempt.expected, lambda: self._prefilled(pick))
        self.in_flight += 1
        return pick

    def _prefilled(self, pick: Pick) -> None:
        attempt, request, now = pick.attempt, pick.request, self._fleet.clock()
        assert attempt is not None
        if not attempt.first:
            attempt.first = True
            self._fleet.dispatcher.prefilled(attempt, None, now)
            self._fleet.shares.discharge(request.tenant, request.id, now)


class _Nobody:
    """Receives no answers: they pass by."""

    def take(self, message: RequestAnswer) -> None: ...

    def fail(self, failure: Exception) -> None: ...


_NOBODY = _Nobody()
