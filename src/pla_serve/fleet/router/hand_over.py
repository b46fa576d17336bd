"""Requests whose KV moves from one instance to another: prefill here, decode there.

A hand-over, with what each message is for in `engine/messages.py`:

    source: AddRequest(hand_over) -> Offer -> Output "handed_over"  -> Release
    target:                  Reserve -> Accepted -> Begin -> Output, Output, ...

With KV that the source has in its cache, `Lend` takes the place of `AddRequest`, and `Begin` comes
without tokens. Whatever fails on the way, the request goes on as one that is continued elsewhere:
its prompt and tokens are prefilled again, from what is cached there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from pla_serve.fleet.link.protocol import NewsMessage
from pla_serve.fleet.router.contract import RoutingObserver
from pla_serve.fleet.router.dispatch import Dispatcher
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.instance_table import InstanceTable
from pla_serve.fleet.router.routed_request import Hand, Leg, RoutedRequest
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.router import Placement
from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    Begin,
    HandOver,
    Lend,
    Offer,
    Output,
    Rejected,
    Release,
    Reserve,
)


class Carrier(Protocol):
    """The part of `Fleet` that hand-overs need."""

    dispatcher: Dispatcher
    clock: Callable[[], float]
    observer: RoutingObserver

    def send(self, instance: FleetInstance, message: msgspec.Struct) -> bool: ...
    def accepted(self, flight: RoutedRequest, cached_tokens: int | None) -> None: ...
    def settle(self, flight: RoutedRequest, leg: Leg) -> None: ...
    def move(self, flight: RoutedRequest, reason: str) -> None: ...
    def place(self, flight: RoutedRequest) -> None: ...
    def deliver(self, flight: RoutedRequest, leg: Leg, output: Output) -> None: ...


class HandOvers:
    """What happens to flights with a `Hand`; those without are not its business."""

    def __init__(self, carrier: Carrier, lease_seconds: float) -> None:
        self._carrier = carrier
        self._lease = lease_seconds

    def start(
        self, flight: RoutedRequest, leg: Leg, place: Placement, instances: InstanceTable
    ) -> bool:
        """Send the request to the instance of ``leg``, by way of a hand-over if there is one.

        Returns whether it could be sent.
        """
        send = self._carrier.send
        flight.hand = None
        if place.fetch_from is not None:
            source = instances[place.fetch_from]
            hand = Hand(source, leg.id, source.epoch, lent=True, target=leg)
            lend = Lend(
                id=leg.id, tokens=flight.request.prompt + flight.tokens, lease_seconds=self._lease
            )
            if send(source, lend):
                flight.hand = hand
                source.flights[leg.id] = flight
                return True
        if self._apart(flight, leg.instance):
            sent = send(leg.instance, flight.message(leg.id, HandOver(lease_seconds=self._lease)))
            if sent:
                flight.hand = Hand(leg.instance, leg.id, leg.epoch, lent=False)
            return sent
        return send(leg.instance, flight.message(leg.id))

    def message(self, flight: RoutedRequest, instance: FleetInstance, message: NewsMessage) -> bool:
        """News of a flight; returns whether that was all there is to do."""
        hand = flight.hand
        if hand is None:
            return isinstance(message, Offer)
        if isinstance(message, Offer):
            self._offered(flight, hand, message)
            return True
        if hand.target is not None and instance is hand.target.instance:  # never its source
            return self._of_target(flight, hand, message)
        return self._of_source(flight, hand, message)

    def lost(self, flight: RoutedRequest, instance: FleetInstance, id: str) -> bool:
        """An instance is gone; returns whether the flight goes on without being moved."""
        hand = flight.hand
        if hand is None:
            return False
        target = hand.target
        if target is not None and instance is target.instance:
            if hand.begun:
                self._close(flight, hand)
                return False
            self._drop_target(hand)
            if hand.lent:
                self._close(flight, hand)
                flight.leg = target
                return False
            self._next_target(flight, hand)
            return True
        hand.done = True
        if hand.begun:
            return True
        if target is None:
            flight.hand = None
            return False
        # The target has some of the KV and computes the rest.
        self._leave_source(flight, hand)
        if hand.lent and hand.offer is None:
            return self._plainly(flight, target, "source lost")
        if hand.reserved:
            self._begin(flight, hand)
        return True

    def dropped(self, flight: RoutedRequest) -> None:
        """The flight ends, or goes on without its hand-over."""
        hand = flight.hand
        if hand is None:
            return
        target = hand.target
        if target is not None and target is not flight.leg:
            self._carrier.send(target.instance, AbortRequest(target.id))
            self._drop_target(hand)
        self._close(flight, hand)

    # Inside

    def _apart(self, flight: RoutedRequest, source: FleetInstance) -> bool:
        """Whether another instance should decode it."""
        facts = source.facts
        if flight.whole:
            return False
        if source.pool is Pool.DECODE or facts is None or facts.transfer is None:
            return False
        if flight.request.sampling.max_tokens <= flight.request.generated + len(flight.tokens) + 1:
            return False
        now = self._carrier.clock()
        plan = self._carrier.dispatcher.plan_decode(flight, flight.request.id, set(), now)
        return plan is not None and _alike(source, plan.instance)

    def _offered(self, flight: RoutedRequest, hand: Hand, offer: Offer) -> None:
        if hand.offer is not None or hand.begun:
            return
        hand.offer = offer.source
        if not hand.lent:
            self._next_target(flight, hand)
            return
        assert hand.target is not None
        if not offer.source:
            self._leave_source(flight, hand)
            self._plainly(flight, hand.target, "nothing cached")
        elif not self._reserve(flight, hand, hand.target):
            self._close(flight, hand)  # the target is being lost

    def _next_target(self, flight: RoutedRequest, hand: Hand) -> None:
        """Another instance to decode it; without one, wherever it is soonest continued."""
        carrier = self._carrier
        now = carrier.clock()
        while hand.offer:
            id = flight.next_id()
            others = hand.tried | {hand.source.name}
            plan = carrier.dispatcher.plan_decode(flight, id, others, now)
            if plan is None:
                break
            hand.tried.add(plan.instance.name)
            if not _alike(hand.source, plan.instance):
                continue
            leg = carrier.dispatcher.charge(flight, plan, now)
            hand.target, hand.reserved = leg, False
            plan.instance.flights[leg.id] = flight
            if self._reserve(flight, hand, leg):
                return
            self._drop_target(hand)
        hand.target = None
        flight.whole = True
        if hand.done:
            carrier.observer.handed_over("no target")
            self._close(flight, hand)
            carrier.place(flight)

    def _reserve(self, flight: RoutedRequest, hand: Hand, leg: Leg) -> bool:
        assert hand.offer is not None
        hand.carried = len(flight.tokens)
        request = flight.message(leg.id)
        return self._carrier.send(
            leg.instance,
            Reserve(request=request, source=hand.offer, lease_seconds=self._lease),
        )

    def _of_source(self, flight: RoutedRequest, hand: Hand, message: NewsMessage) -> bool:
        if hand.lent:
            if isinstance(message, (Rejected, Output)):
                assert hand.target is not None
                self._leave_source(flight, hand)
                self._plainly(flight, hand.target, "source refused")
            return True
        if not isinstance(message, Output) or message.finish_reason is None:
            if isinstance(message, Rejected):
                self.dropped(flight)
            return False
        if message.finish_reason != "handed_over":
            self.dropped(flight)
            return False
        leg = flight.leg
        assert leg is not None
        self._carrier.deliver(flight, leg, msgspec.structs.replace(message, finish_reason=None))
        if flight.hand is not hand:
            return True  # its client closed it
        hand.done = True
        self._carrier.dispatcher.grown(flight, leg)
        self._carrier.settle(flight, leg)
        if hand.reserved:
            self._begin(flight, hand)
        elif hand.target is None:
            self._next_target(flight, hand)
        return True

    def _of_target(self, flight: RoutedRequest, hand: Hand, message: NewsMessage) -> bool:
        target = hand.target
        assert target is not None
        if isinstance(message, Accepted):
            hand.reserved = True
            self._carrier.accepted(flight, message.cached_tokens)
            if hand.done or hand.lent:
                self._begin(flight, hand)
            return True
        if hand.begun and isinstance(message, Output) and message.finish_reason != "error":
            self._close(flight, hand)  # all KV that it will read has been read
            return False
        if hand.begun and isinstance(message, Output):
            self._close(flight, hand)
            return False  # an error like any other
        if hand.begun:
            self._carrier.observer.handed_over("late")
            flight.whole = True
            self._close(flight, hand)
            self._carrier.settle(flight, target)
            self._carrier.place(flight)
        elif hand.lent:
            self._close(flight, hand)
            self._plainly(flight, target, "target refused")
        else:
            self._carrier.observer.handed_over("target refused")
            self._drop_target(hand)
            self._next_target(flight, hand)
        return True

    def _begin(self, flight: RoutedRequest, hand: Hand) -> None:
        target = hand.target
        assert target is not None
        hand.begun = True
        flight.leg = target
        if not hand.lent:
            target.expected, target.alone = 0.0, None  # no first token of a prompt to learn from
        # What the source made since the target was told of the request: the first token, or none.
        tokens = flight.tokens[hand.carried :]
        if self._carrier.send(target.instance, Begin(id=target.id, tokens=tokens)):
            self._carrier.observer.handed_over("begun")

    def _plainly(self, flight: RoutedRequest, target: Leg, why: str) -> bool:
        """No KV comes: the target computes all of it."""
        self._carrier.observer.handed_over(why)
        flight.hand = None
        flight.leg = target
        target.fetched, target.alone = 0, None
        self._carrier.send(target.instance, flight.message(target.id))
        return True

    def _leave_source(self, flight: RoutedRequest, hand: Hand) -> None:
        hand.source.flights.pop(hand.source_id, None)
        leg = flight.leg
        if leg is not None and leg.instance is hand.source:
            self._carrier.settle(flight, leg)

    def _drop_target(self, hand: Hand) -> None:
        target, hand.target, hand.reserved = hand.target, None, False
        if target is not None:
            target.instance.flights.pop(target.id, None)
            self._carrier.dispatcher.finished(target, self._carrier.clock())

    def _close(self, flight: RoutedRequest, hand: Hand) -> None:
        """Let the source free its KV."""
        flight.hand = None
        if hand.lent:
            hand.source.flights.pop(hand.source_id, None)
        if hand.source.epoch == hand.source_epoch:
            self._carrier.send(hand.source, Release(hand.source_id))


def _alike(source: FleetInstance, target: FleetInstance) -> bool:
    """Whether they can exchange KV."""
    return (
        source.facts is not None
        and target.facts is not None
        and source.facts.transfer is not None
        and source.facts.transfer == target.facts.transfer
    )
