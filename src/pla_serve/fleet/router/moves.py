"""Moves running requests to other instances with their KV, while they go on decoding.

A move is a loan of cached KV (`wire/transfer.py`): a running request's whole blocks are in the
prefix cache of its instance. Until the target begins, nothing has changed for the request: it
decodes where it is, and a move that fails is forgotten.

    source:  Lend -> Offer ............................ AbortRequest ... Release
    target:                 Reserve -> Accepted -> Begin -> Output, Output, ...

`Begin` carries the tokens that the source made since `Reserve`. From then on it is a hand-over like
any other (`hand_over.py`), whose target has begun.
"""

from __future__ import annotations

from dataclasses import dataclass

from pla_serve.fleet.link.protocol import RequestAnswer
from pla_serve.fleet.router.attempts import Attempts
from pla_serve.fleet.router.contract import RoutingObserver
from pla_serve.fleet.router.dispatch import Dispatcher
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.hand_over import HandOverState, Source, Target
from pla_serve.fleet.router.kv_exchange import KvExchange, can_exchange
from pla_serve.fleet.router.routed_request import Attempt, OngoingHandOver, RoutedRequest
from pla_serve.wire import engine as wire


@dataclass(slots=True, eq=False)
class DecodeMove:
    """A move whose target has not begun."""

    request: RoutedRequest
    source: Attempt
    """The attempt that goes on meanwhile."""
    target: Attempt
    """The attempt that begins if the move succeeds; it is charged to the target."""
    loan: str
    """Name of the loan on the source."""
    carried: int = 0
    """Output tokens that `Reserve` told the target of."""


class DecodeMoves:
    """All moves of a router. Requests that do not move are ignored everywhere."""

    def __init__(
        self,
        attempts: Attempts,
        dispatcher: Dispatcher,
        observer: RoutingObserver,
        kv: KvExchange,
    ) -> None:
        self._attempts = attempts
        self._dispatcher = dispatcher
        self._observer = observer
        self._kv = kv
        self._moves: dict[str, DecodeMove] = {}
        """Moves by the id of their request."""
        self._loans: dict[tuple[str, str], DecodeMove] = {}
        """The same moves by their source and the name of their loan there."""

    def __len__(self) -> int:
        return len(self._moves)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._moves

    def from_instance(self, instance: FleetInstance) -> int:
        """Return the number of requests that are moving away from an instance."""
        return sum(move.source.instance is instance for move in self._moves.values())

    def start(self, request: RoutedRequest, target: FleetInstance) -> bool:
        """Begin to move a request that decodes; return whether it could be begun."""
        source = request.attempt
        if source is None or not source.first or request.hand_over is not None:
            return False
        if request.id in self._moves or not can_exchange(source.instance, target):
            return False
        now, id, loan = self._attempts.clock(), request.next_id(), f"{request.next_id()}/move"
        plan = self._dispatcher.plan_at(request, id, target, now)
        attempt = self._attempts.open(request, plan, now)
        attempt.expected, attempt.alone = 0.0, None  # no prefill whose time could be learnt
        move = DecodeMove(request, source, attempt, loan)
        self._moves[request.id] = self._loans[source.instance.name, loan] = move
        if self._kv.lend(source.instance, loan, request):
            return True
        self.cancel(request)
        return False

    def message(self, instance: FleetInstance, message: RequestAnswer) -> bool:
        """Handle a message, and return whether it was one of a move."""
        if (move := self._loans.get((instance.name, message.id))) is not None:
            if isinstance(message, wire.Offer):
                self._offered(move, message.source)
            else:
                self.cancel(move.request)
            return True
        if (id := instance.attempts.get(message.id)) is None:
            return False
        target = self._moves.get(id)
        if target is None or target.target.id != message.id:
            return False
        if isinstance(message, wire.Accepted):
            self._begin(target)
        else:
            self.cancel(target.request)
        return True

    def lost(self, instance: FleetInstance) -> None:
        """End the moves from and to an instance that was lost."""
        for move in list(self._moves.values()):
            if instance in (move.source.instance, move.target.instance):
                self.cancel(move.request)

    def cancel(self, request: RoutedRequest) -> None:
        """End a move, and leave the request where it is; called too when the request ends."""
        move = self._forget(request)
        if move is not None:
            self._observer.handed_over("move given up")
            self._attempts.send(move.target.instance, wire.AbortRequest(move.target.id))
            self._attempts.settle(request, move.target)
            self._attempts.send(move.source.instance, wire.Release(move.loan))

    def _offered(self, move: DecodeMove, address: bytes) -> None:
        """Ask the target for memory, and have it read."""
        move.carried = len(move.request.tokens)
        if not address or not self._kv.reserve(move.target, move.request, address):
            self.cancel(move.request)

    def _begin(self, move: DecodeMove) -> None:
        """Have the target go on, and the source stop."""
        request, source, target = move.request, move.source, move.target
        self._forget(request)
        tokens = request.tokens[move.carried :]
        self._attempts.settle(request, source)
        self._attempts.send(source.instance, wire.AbortRequest(source.id))
        begun = HandOverState(lent=True, source=Source.COMPLETE, target=Target.BEGUN)
        request.hand_over = OngoingHandOver(begun, source.instance, move.loan, source.epoch, target)
        request.attempt = target
        self._observer.moved(source.instance.name, "drained", True)
        self._observer.handed_over("moved")
        self._attempts.send(target.instance, wire.Begin(id=target.id, tokens=tokens))

    def _forget(self, request: RoutedRequest) -> DecodeMove | None:
        move = self._moves.pop(request.id, None)
        if move is not None:
            del self._loans[move.source.instance.name, move.loan]
        return move
