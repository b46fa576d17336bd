"""The router's core: requests in, messages to instances out, and what becomes of failures.

Synchronous, with clock and timers from outside, so that tests can go through any order of events.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import ceil, inf

import msgspec

from pla_serve.fleet.link.protocol import (
    InstanceFacts,
    InstanceReport,
    Link,
    LinkDown,
    NewsMessage,
)
from pla_serve.fleet.router.contract import FleetOptions, Later, RoutingObserver
from pla_serve.fleet.router.dispatch import BLAME_SECONDS, Dispatcher, DispatchPlan
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.hand_over import HandOvers
from pla_serve.fleet.router.instance_table import InstanceTable
from pla_serve.fleet.router.keys import KeyShares
from pla_serve.fleet.router.parking import Parking
from pla_serve.fleet.router.prefixes import Chain
from pla_serve.fleet.router.routed_request import Blame, Leg, RoutedRequest, with_seed
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.server.engine.session import EngineDiedError, NewsReceiver
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    Output,
    Rejected,
)

log = logging.getLogger(__name__)

MOST_ROUNDS = 8
"""Failures of one request with tokens in between, as a multiple of those without."""


class Fleet:
    """Implements `LinkEvents`. All methods belong to one event loop.

    A request is in one of three states: on an instance (``leg``), parked until there is one that
    takes it, or ended. Each ends exactly once: with its last token, with `Rejected`, with an error,
    or because its client closed it.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        later: Later,
        observer: RoutingObserver,
        *,
        options: FleetOptions | None = None,
        routing: RoutingPolicy | None = None,
        on_change: Callable[[], None] = lambda: None,
        timer: Callable[[], float] | None = None,
    ) -> None:
        """
        Args:
            on_change: called when an instance came, went, opened or closed.
            timer: measures decisions; ``clock`` if None.
        """
        self.clock = clock
        self.observer = observer
        self._options = options = options or FleetOptions()
        self._on_change = on_change
        self._timer = timer or clock
        self._roster = InstanceTable(self._options.circuit)
        self._flights: dict[str, RoutedRequest] = {}
        self._parking = Parking(later, self.place)
        self._hands = HandOvers(self, options.lease_seconds)
        self.dispatcher = Dispatcher(self._roster.__getitem__, routing)
        self.shares = KeyShares()

    # For others to look at

    @property
    def instances(self) -> Sequence[FleetInstance]:
        return self._roster.all

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def parked(self) -> int:
        """Requests that no instance takes just now."""
        return len(self._parking)

    @property
    def held_seconds(self) -> float:
        """Predicted prefill of what is parked, as if nothing of it were cached."""
        return self.dispatcher.uncached_seconds(self._parking)

    @property
    def serving(self) -> bool:
        """Some instance takes requests."""
        return any(instance.open for instance in self._roster.all)

    def attach(self, link: Link) -> FleetInstance:
        """An instance of the fleet, before its link runs.

        Raises:
            ValueError: there is one with the same URL.
        """
        return self._roster.attach(link)

    # Requests

    def submit(self, request: AddRequest, receiver: NewsReceiver, tenant: str) -> None:
        """News goes to ``receiver`` until the request has ended or `close` is called."""
        flight = RoutedRequest(with_seed(request), receiver, tenant, Chain(request.prompt))
        self._flights[request.id] = flight
        self.place(flight)

    def close(self, id: str) -> None:
        """Its client wants no more of it; unknown ids, and those that have ended, are ignored."""
        flight = self._flights.get(id)
        if flight is None:
            return
        leg = flight.leg
        self._hands.dropped(flight)
        self._end(flight)
        if leg is not None:
            self.send(leg.instance, AbortRequest(leg.id))

    def fail_all(self, reason: str) -> None:
        """End everything."""
        for flight in list(self._flights.values()):
            if flight.request.id in self._flights:
                self._fail(flight, reason)

    # LinkEvents

    def connected(self, link: Link, facts: InstanceFacts) -> None:
        instance, now = self._roster.of(link), self.clock()
        if self._roster.connected(instance, facts):
            self.dispatcher.prefixes.clear(instance.name)
        if instance.unfit:
            log.error("%s must not serve: %s", instance.name, instance.unfit)
            return
        log.info("%s is connected (%s)", instance.name, facts.kind)
        self.dispatcher.join(instance, now)
        self._changed()

    def report(self, link: Link, report: InstanceReport) -> None:
        instance = self._roster.of(link)
        was = (instance.open, instance.role)
        instance.report = report
        if instance.unfit:
            return
        self.observer.reported(link, report)
        self.dispatcher.reported(instance, report, self.clock())
        if (instance.open, instance.role) != was:
            self._changed()

    def lost(self, link: Link, reason: str) -> None:
        instance, now = self._roster.of(link), self.clock()
        instance.lost(reason)
        log.warning("lost %s with %d requests: %s", instance.name, len(instance.flights), reason)
        flights, instance.flights = dict(instance.flights), {}
        if flights:
            instance.circuit.failed(now)
        self.dispatcher.leave(instance)
        self.observer.gone(link)
        self._on_change()
        for leg_id, flight in flights.items():
            if flight.request.id not in self._flights:
                continue  # ended while another one was told
            if self._hands.lost(flight, instance, leg_id):
                continue
            self.observer.moved(instance.name, "lost", bool(flight.tokens))
            self.move(flight, f"{instance.name} was lost: {reason}")

    def message(self, link: Link, message: NewsMessage) -> None:
        instance = self._roster.of(link)
        flight = instance.flights.get(message.id)
        if flight is None:
            return  # of a stay that is over
        if self._hands.message(flight, instance, message):
            return
        leg = flight.leg
        assert leg is not None
        if isinstance(message, Output):
            self._output(flight, leg, message)
        elif isinstance(message, Rejected):
            self._rejected(flight, leg, message)
        elif isinstance(message, Accepted):
            self.accepted(flight, message.cached_tokens)

    # For `HandOvers`

    def send(
        self, instance: FleetInstance, message: AddRequest | AbortRequest | msgspec.Struct
    ) -> bool:
        """False: it is not connected, and `lost` has been told or will be."""
        if not instance.connected:
            return False
        try:
            instance.link.send(message)  # type: ignore[arg-type]
        except LinkDown:
            return False
        return True

    def accepted(self, flight: RoutedRequest, cached_tokens: int | None) -> None:
        """Tell the client side, once."""
        if not flight.told:
            flight.told = True
            flight.receiver.take(Accepted(flight.request.id, cached_tokens))

    def settle(self, flight: RoutedRequest, leg: Leg) -> None:
        """Its stay there is over; if it was a probe and nothing was learnt, another may be one."""
        leg.instance.flights.pop(leg.id, None)
        leg.instance.circuit.withdrawn(leg.id)
        self.dispatcher.finished(leg, self.clock())
        flight.leg = None

    def move(self, flight: RoutedRequest, reason: str) -> None:
        """An instance failed it: elsewhere, or the end if that happened too often."""
        leg, now = flight.leg, self.clock()
        if leg is not None:
            flight.avoid[leg.instance.name] = Blame(leg.instance.boot, leg.epoch, now)
            self.settle(flight, leg)
        flight.failures.append(reason)
        flight.fruitless += 1
        flight.stalled = now
        most = self._options.most_failures
        if flight.fruitless >= most or len(flight.failures) >= MOST_ROUNDS * most:
            self.observer.refused("failures")
            self._fail(flight, f"given up after {len(flight.failures)} failures: {reason}")
            return
        flight.refused.clear()
        self.place(flight)

    def deliver(self, flight: RoutedRequest, leg: Leg, output: Output) -> None:
        """Give the client tokens, and the end if it is one."""
        if not leg.first and (output.tokens or output.finish_reason):
            leg.first = True
            self._first(flight, leg, output)
        changed: dict[str, str | None] = {}
        if output.id != flight.request.id:
            changed["id"] = flight.request.id
        if flight.tokens and output.cached_tokens is not None:
            changed["cached_tokens"] = None  # what counts is what the prompt found at first
        flight.told = True
        flight.tokens += output.tokens
        if output.finish_reason is not None:
            self.dispatcher.grown(flight, leg)
            self._end(flight)
        flight.receiver.take(msgspec.structs.replace(output, **changed) if changed else output)

    # Inside

    def place(self, flight: RoutedRequest) -> None:
        """Send it somewhere, park it, or refuse it."""
        self._parking.leave(flight)
        while True:
            now, began = self.clock(), self._timer()
            id = flight.next_id()
            plan = self.dispatcher.plan(flight, id, now)
            self.observer.decided(self._timer() - began)
            if plan is None:
                self._nowhere(flight, now)
                return
            if not flight.told and not flight.failures and self._beyond_share(flight, plan, now):
                return
            if self._sent(flight, plan, now):
                return

    def _sent(self, flight: RoutedRequest, plan: DispatchPlan, now: float) -> bool:
        instance = plan.instance
        leg = self.dispatcher.charge(flight, plan, now)
        flight.leg = leg
        instance.flights[leg.id] = flight
        instance.circuit.sent(leg.id)
        if not self._hands.start(flight, leg, plan.place, self._roster):
            self.settle(flight, leg)
            flight.avoid[instance.name] = Blame(instance.boot, instance.epoch, now)
            return False
        self.shares.charge(flight.tenant, flight.request.id, plan.place.seconds, now)
        self.observer.dispatched(instance.name, plan.short, plan.place.seconds, now)
        return True

    def _beyond_share(self, flight: RoutedRequest, plan: DispatchPlan, now: float) -> bool:
        """Refuses it if the fleet is over its capacity and its key has had its part."""
        most = self._options.max_predicted_wait
        if most is None or plan.wait <= most:
            return False
        limit = most * self.dispatcher.count()
        if self.shares.entitled(flight.tenant, plan.place.seconds, limit, now):
            return False
        self.observer.refused("share" if flight.tenant else "capacity")
        reason = f"the fleet has more work than it does in {most:g} s"
        self._refuse(flight, reason, plan.wait - most)
        return True

    def _nowhere(self, flight: RoutedRequest, now: float) -> None:
        """No instance may have it now."""
        if flight.stalled is None:
            flight.stalled = now
        left = flight.stalled + self._options.patience_seconds - now
        retry = min(flight.refused.values(), default=inf)
        if not flight.told and flight.refused:
            self.observer.refused("capacity")
            self._refuse(flight, "no instance has room for it", retry)
        elif left <= 0:
            self.observer.refused("failures")
            why = f" ({flight.failures[-1]})" if flight.failures else ""
            self._fail(flight, f"no instance is ready{why}")
        else:
            soon = BLAME_SECONDS if flight.avoid else left
            self._parking.park(flight, min(left, max(min(retry, soon), 0.05)))

    def _changed(self) -> None:
        """More may be possible than before."""
        self._on_change()
        self._parking.wake_all()

    def _output(self, flight: RoutedRequest, leg: Leg, output: Output) -> None:
        if output.finish_reason not in ("error", "abort", "handed_over"):
            self.deliver(flight, leg, output)
            return
        if output.tokens:
            self.deliver(
                flight, leg, msgspec.structs.replace(output, finish_reason=None, error=None)
            )
        if flight.leg is not leg:
            return  # its client closed it on the way
        reason = output.error or "it ended the request without a reason"
        leg.instance.circuit.failed(self.clock())
        self.dispatcher.note(leg.instance)
        self.observer.moved(leg.instance.name, "error", bool(flight.tokens))
        self.move(flight, f"{leg.instance.name} failed it: {reason}")

    def _first(self, flight: RoutedRequest, leg: Leg, output: Output) -> None:
        now = self.clock()
        flight.stalled, flight.fruitless = None, 0
        due = flight.request.deadline
        late = None if due is None or flight.tokens else now - due
        self.observer.began(leg, output.cached_tokens, late, now)
        self.dispatcher.prefilled(leg, output.cached_tokens, now)
        self.shares.discharge(flight.tenant, flight.request.id, now)
        circuit = leg.instance.circuit
        was_closed = circuit.closed
        circuit.succeeded()
        if not was_closed:
            self.dispatcher.note(leg.instance)
            self._changed()

    def _rejected(self, flight: RoutedRequest, leg: Leg, rejected: Rejected) -> None:
        """No room there, or it never can: elsewhere, and only then back to the client."""
        instance = leg.instance
        self.settle(flight, leg)
        self.observer.moved(instance.name, "refused", bool(flight.tokens))
        if rejected.retry_after is None:
            kind = instance.facts.kind if instance.facts else None
            alike = [i.name for i in self.instances if i.facts and i.facts.kind == kind]
            flight.refused.update(dict.fromkeys(alike, inf))
            if all(i.name in flight.refused for i in self.instances if i.open):
                self._reject(flight, rejected)
                return
        else:
            flight.refused[instance.name] = rejected.retry_after
        self.place(flight)

    def _refuse(self, flight: RoutedRequest, reason: str, seconds: float) -> None:
        seconds = float(ceil(max(seconds, 1.0))) if seconds < inf else 5.0
        self._reject(flight, Rejected(id=flight.request.id, reason=reason, retry_after=seconds))

    def _reject(self, flight: RoutedRequest, rejected: Rejected) -> None:
        """The end: as refused if the client does not know better yet, else as an error."""
        if flight.told:
            self._fail(flight, rejected.reason)
            return
        self._end(flight)
        flight.receiver.take(msgspec.structs.replace(rejected, id=flight.request.id))

    def _fail(self, flight: RoutedRequest, reason: str) -> None:
        leg = flight.leg
        self._hands.dropped(flight)
        self._end(flight)
        if leg is not None:
            self.send(leg.instance, AbortRequest(leg.id))
        log.error("request %s failed: %s", flight.request.id, reason)
        flight.receiver.fail(EngineDiedError(reason))

    def _end(self, flight: RoutedRequest) -> None:
        """Forget it, with all that is charged for it."""
        self._flights.pop(flight.request.id, None)
        self._parking.leave(flight)
        self.shares.discharge(flight.tenant, flight.request.id, self.clock())
        if flight.leg is not None:
            self.settle(flight, flight.leg)
