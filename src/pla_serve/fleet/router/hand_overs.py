"""Drives hand-overs: messages become events of `hand_over.advance`, whose effects are performed."""

from __future__ import annotations

from pla_serve.fleet.link.protocol import RequestAnswer
from pla_serve.fleet.router.attempts import Attempts
from pla_serve.fleet.router.contract import RoutingObserver
from pla_serve.fleet.router.dispatch import Dispatcher
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.hand_over import (
    LENDING,
    Effect,
    Event,
    HandOverState,
    Offered,
    Outcome,
    advance,
)
from pla_serve.fleet.router.instance_table import InstanceTable
from pla_serve.fleet.router.kv_exchange import KvExchange, can_exchange
from pla_serve.fleet.router.routed_request import Attempt, OngoingHandOver, RoutedRequest
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.router import Placement
from pla_serve.wire import engine as wire

Remainder = Effect | None
"""Part of an event that is left to the fleet: `Effect.ORDINARY`, `Effect.PLACE_TOGETHER`, None."""


class HandOvers:
    """Performs everything that a hand-over needs but to place a request or to talk to its client.

    Args:
        instances: by name.
    """

    def __init__(
        self,
        attempts: Attempts,
        dispatcher: Dispatcher,
        instances: InstanceTable,
        observer: RoutingObserver,
        kv: KvExchange,
    ) -> None:
        self._attempts = attempts
        self._dispatcher = dispatcher
        self._instances = instances
        self._observer = observer
        self._kv = kv

    def start(self, request: RoutedRequest, attempt: Attempt, place: Placement) -> bool:
        """Send the request to the instance of ``attempt``, with a hand-over where one helps.

        Returns whether the request could be sent.
        """
        request.hand_over = None
        if place.fetch_from is not None and self._borrow(request, attempt, place.fetch_from):
            return True
        instance = attempt.instance
        if not self._decodes_elsewhere(request, instance):
            return self._attempts.send(instance, request.message(attempt.id))
        order = wire.HandOver(lease_seconds=self._kv.lease_seconds)
        sent = self._attempts.send(instance, request.message(attempt.id, order))
        if sent:
            request.hand_over = OngoingHandOver(
                HandOverState(), instance, attempt.id, attempt.epoch
            )
        return sent

    def message(
        self, request: RoutedRequest, instance: FleetInstance, message: RequestAnswer
    ) -> Remainder:
        """Handle a message about the request, and return what is left to do."""
        hand_over = request.hand_over
        if hand_over is None:
            return None if isinstance(message, wire.Offer) else Effect.ORDINARY
        if isinstance(message, wire.Offer):
            return self._advance(request, Offered(message.source))
        target = hand_over.target
        if target is not None and instance is target.instance:  # never the source
            return self._advance(request, _target_event(hand_over.state, message))
        event = _source_event(message)
        if event is None:
            return None if hand_over.state.lent else Effect.ORDINARY
        return self._advance(request, event)

    def lost(self, request: RoutedRequest, instance: FleetInstance) -> Remainder:
        """Handle the loss of an instance that takes part in the request."""
        hand_over = request.hand_over
        if hand_over is None:
            return Effect.ORDINARY
        target = hand_over.target
        of_target = target is not None and instance is target.instance
        return self._advance(request, Event.TARGET_LOST if of_target else Event.SOURCE_LOST)

    def drop(self, request: RoutedRequest) -> None:
        """End the hand-over of a request that ends; ignored if it has none."""
        if request.hand_over is not None:
            self._advance(request, Event.DROPPED)

    # Start

    def _borrow(self, request: RoutedRequest, attempt: Attempt, name: str) -> bool:
        """Ask the instance of this name to lend what it has cached."""
        source = self._instances[name]
        if not self._kv.lend(source, attempt.id, request):
            return False
        source.attempts[attempt.id] = request.id
        request.hand_over = OngoingHandOver(
            LENDING, source, attempt.id, source.epoch, target=attempt
        )
        return True

    def _decodes_elsewhere(self, request: RoutedRequest, source: FleetInstance) -> bool:
        """Whether another instance should decode the request."""
        facts = source.facts
        if request.together or request.scoring or source.pool is Pool.DECODE:
            return False
        if facts is None or facts.transfer is None:
            return False
        original = request.original
        if original.sampling.max_tokens <= original.generated + len(request.tokens) + 1:
            return False
        plan = self._dispatcher.plan_decode(request, request.id, set(), self._attempts.clock())
        return plan is not None and can_exchange(source, plan.instance)

    # Effects

    def _advance(self, request: RoutedRequest, event: Event | Offered) -> Remainder:
        """Advance the hand-over by an event, and by those that performing its effects answers."""
        hand_over = request.hand_over
        assert hand_over is not None
        left: Remainder = None
        answer: Event | Offered | None = event
        while answer is not None:
            state, effects = advance(hand_over.state, answer)
            answer = None
            if state is None:
                request.hand_over = None
                if hand_over.state.lent:
                    hand_over.source.attempts.pop(hand_over.source_id, None)
            else:
                hand_over.state = state
            for effect in effects:
                if isinstance(effect, Outcome):
                    self._observer.handed_over(effect.name)
                elif effect in (Effect.ORDINARY, Effect.PLACE_TOGETHER):
                    left = effect
                else:
                    answer = self._perform(request, hand_over, effect)
        return left

    def _perform(
        self, request: RoutedRequest, hand_over: OngoingHandOver, effect: Effect
    ) -> Event | None:
        """Perform one effect; returns the event that answers it, if there is one."""
        if effect is Effect.RELEASE:
            if hand_over.source.epoch == hand_over.source_epoch:
                self._attempts.send(hand_over.source, wire.Release(hand_over.source_id))
            return None
        if effect is Effect.FIND_TARGET:
            return self._find_target(request, hand_over)
        if effect is Effect.SETTLE_SOURCE:
            if request.attempt is not None:
                self._attempts.settle(request, request.attempt)
            return None
        target = hand_over.target
        assert target is not None, f"{effect} without a target"
        if effect is Effect.RESERVE:
            return self._reserve(request, hand_over, target)
        if effect is Effect.BEGIN:
            self._begin(request, hand_over, target)
        elif effect is Effect.SEND_WHOLE:
            target.fetched, target.alone = 0, None
            self._attempts.send(target.instance, request.message(target.id))
        elif effect is Effect.ABORT_TARGET:
            self._attempts.send(target.instance, wire.AbortRequest(target.id))
        elif effect is Effect.SETTLE_TARGET:
            self._attempts.settle(request, target)
            hand_over.target = None
        return None

    def _find_target(self, request: RoutedRequest, hand_over: OngoingHandOver) -> Event:
        now = self._attempts.clock()
        while True:
            others = hand_over.tried | {hand_over.source.name}
            plan = self._dispatcher.plan_decode(request, request.next_id(), others, now)
            if plan is None:
                return Event.TARGET_MISSING
            hand_over.tried.add(plan.instance.name)
            if can_exchange(hand_over.source, plan.instance):
                hand_over.target = self._attempts.open(request, plan, now)
                return Event.TARGET_FOUND

    def _reserve(
        self, request: RoutedRequest, hand_over: OngoingHandOver, target: Attempt
    ) -> Event | None:
        hand_over.carried = len(request.tokens)
        sent = self._kv.reserve(target, request, hand_over.state.address)
        return None if sent else Event.TARGET_UNREACHABLE

    def _begin(self, request: RoutedRequest, hand_over: OngoingHandOver, target: Attempt) -> None:
        request.attempt = target
        if not hand_over.state.lent:
            target.expected, target.alone = 0.0, None  # no prefill whose time could be learnt
        # Output since `Reserve`: the first token, or nothing if the source made none.
        tokens = request.tokens[hand_over.carried :]
        self._attempts.send(target.instance, wire.Begin(id=target.id, tokens=tokens))


def _source_event(message: RequestAnswer) -> Event | None:
    """The event that a message of the source is; None for one that changes nothing."""
    if isinstance(message, wire.Rejected):
        return Event.SOURCE_ENDED
    if not isinstance(message, wire.Output) or message.finish_reason is None:
        return None
    handed_over = message.finish_reason == "handed_over"
    return Event.SOURCE_HANDED_OVER if handed_over else Event.SOURCE_ENDED


def _target_event(state: HandOverState, message: RequestAnswer) -> Event:
    if isinstance(message, wire.Accepted):
        return Event.TARGET_ACCEPTED
    if isinstance(message, wire.Output) and not state.reserved:
        return Event.TARGET_OUTPUT
    return Event.TARGET_REFUSED
