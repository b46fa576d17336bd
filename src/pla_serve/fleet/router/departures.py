"""Empties instances that have said when they will end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pla_serve.fleet.link.protocol import InstanceReport
from pla_serve.fleet.router.contract import Later
from pla_serve.fleet.router.dispatch import Dispatcher
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.kv_exchange import can_exchange
from pla_serve.fleet.router.moves import DecodeMoves
from pla_serve.fleet.router.routed_request import RoutedRequest
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.assignment import Host, Mover, assign

LOOK_SECONDS = 0.1
"""Time between two looks at instances that will end."""
MARGIN_SECONDS = 2.0
"""Moves begin so long before the time that they are predicted to take is all that is left."""
LAST_SECONDS = 0.5
"""Time before the end in which what is still there is continued elsewhere, as after a crash."""
MOST_MOVES = 4
"""Requests that move away from one instance at one time: they share its memory bandwidth."""
MOST_ASSIGNED = 2 * MOST_MOVES
"""Requests for which places are sought at one time, which bounds the time of a look."""


class EmptiedFleet(Protocol):
    """The part of a fleet that this needs."""

    clock: Callable[[], float]
    dispatcher: Dispatcher

    @property
    def instances(self) -> Sequence[FleetInstance]: ...

    def place_anew(self, request: RoutedRequest) -> None: ...


class Departures:
    """Moves requests away from instances that end, as late as that is safe.

    Requests go on decoding where they are as long as a move still fits; many end by themselves.
    Then those that decode move with their KV (`DecodeMoves`), as `assign` finds best. Those whose
    prefill has not begun, or would not end in time, and in the last moment all that is left, are
    placed anew, if there is another instance.

    Args:
        requests: all requests of the fleet by id.
    """

    def __init__(
        self,
        fleet: EmptiedFleet,
        requests: Mapping[str, RoutedRequest],
        moves: DecodeMoves,
        later: Later,
    ) -> None:
        self._fleet = fleet
        self._requests = requests
        self._moves = moves
        self._later = later
        self._ends: dict[str, float] = {}
        """When instances end, by name."""
        self._looking = False

    def reported(self, instance: FleetInstance, report: InstanceReport) -> None:
        """Take over when an instance ends, or that it will not."""
        if report.ends_in is None:
            self._ends.pop(instance.name, None)
            return
        self._ends[instance.name] = self._fleet.clock() + report.ends_in
        if not self._looking:
            self._looking = True
            self._later(0.0, self._look)

    def lost(self, instance: FleetInstance) -> None:
        """Forget an instance that has ended."""
        self._ends.pop(instance.name, None)

    def _look(self) -> None:
        self._looking = False
        for instance in self._fleet.instances:
            end = self._ends.get(instance.name)
            if end is not None and instance.connected:
                self._empty(instance, end - self._fleet.clock())
        if self._ends and not self._looking:
            self._looking = True
            self._later(LOOK_SECONDS, self._look)

    def _empty(self, instance: FleetInstance, left: float) -> None:
        """Do what is due for one instance that ends in ``left`` seconds."""
        others = [each for each in self._fleet.instances if each is not instance and each.open]
        here = [
            request
            for id in dict.fromkeys(instance.attempts.values())
            if (request := self._requests.get(id)) is not None
            and request.attempt is not None
            and request.attempt.instance is instance
        ]
        if not others:
            return
        now, decoding = self._fleet.clock(), list[RoutedRequest]()
        for request in here:
            attempt = request.attempt
            assert attempt is not None
            if request.hand_over is not None and left > LAST_SECONDS:
                continue  # it leaves by itself, or has just come
            if attempt.first and left > LAST_SECONDS:
                decoding.append(request)
            elif (
                attempt.sent + attempt.expected + MARGIN_SECONDS > now + left
                or left <= LAST_SECONDS
            ):
                self._fleet.place_anew(request)
        if decoding and left <= MARGIN_SECONDS + sum(map(self._seconds, decoding)):
            self._move(instance, decoding, others)

    def _seconds(self, request: RoutedRequest) -> float:
        """Return the predicted time of a move beside others, and until the next one begins."""
        cost = self._fleet.dispatcher.cost
        return cost.transfer_seconds(request.known_tokens) + LOOK_SECONDS / MOST_MOVES

    def _move(
        self,
        instance: FleetInstance,
        decoding: Sequence[RoutedRequest],
        others: Sequence[FleetInstance],
    ) -> None:
        """Begin as many moves as may run at one time."""
        free = MOST_MOVES - self._moves.from_instance(instance)
        waiting = [request for request in decoding if request.id not in self._moves]
        waiting = waiting[:MOST_ASSIGNED]
        decoders = [each for each in others if each.pool is Pool.DECODE]
        hosts = {each.name: each for each in decoders or others if can_exchange(instance, each)}
        if free <= 0 or not waiting or not hosts:
            return
        dispatcher = self._fleet.dispatcher
        movers = [Mover(r.known_tokens, dispatcher.cached(r)) for r in waiting]
        places = assign(
            movers,
            [Host(n, _room(each), dispatcher.outstanding(n)[1]) for n, each in hosts.items()],
            dispatcher.cost.transfer_seconds,
            dispatcher.cost.launch_seconds,
        )
        for request, name in zip(waiting, places, strict=True):
            if free and name is not None and self._moves.start(request, hosts[name]):
                free -= 1


def _room(instance: FleetInstance) -> int:
    """Tokens of KV for which an instance has memory, as last reported; no bound if unknown."""
    report, facts = instance.report, instance.facts
    tokens = (report.kv_tokens if report else 0) or (facts.kv_tokens if facts else 0)
    if not tokens:
        return 1 << 40
    return int(tokens * (1.0 - (report.load.kv_usage if report else 0.0)))
