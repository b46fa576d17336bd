"""The router's core: requests come in, messages to instances go out, failures are routed around.

Synchronous, with clock and timers as arguments, so that tests and the simulator can drive it
through any order of events.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import inf

import msgspec

from pla_serve.fleet.link.protocol import InstanceFacts, InstanceReport, Link, LossCause
from pla_serve.fleet.router.attempts import Attempts
from pla_serve.fleet.router.contract import FleetOptions, Later, RoutingObserver
from pla_serve.fleet.router.departures import Departures
from pla_serve.fleet.router.dispatch import BLAME_SECONDS, Dispatcher, DispatchPlan
from pla_serve.fleet.router.ends import RequestEnds
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.hand_over import Effect
from pla_serve.fleet.router.hand_overs import HandOvers, Remainder
from pla_serve.fleet.router.instance_table import InstanceTable
from pla_serve.fleet.router.keys import KeyShares
from pla_serve.fleet.router.kv_exchange import KvExchange
from pla_serve.fleet.router.moves import DecodeMoves
from pla_serve.fleet.router.parking import Parking
from pla_serve.fleet.router.prefixes import Chain
from pla_serve.fleet.router.routed_request import Attempt, Blame, RoutedRequest, with_seed
from pla_serve.fleet.router.suspects import Suspects, given_up, log_failure
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.server.engine.session import AnswerReceiver
from pla_serve.wire import engine as wire

log = logging.getLogger(__name__)


class Fleet:
    """Implements `LinkEvents`. All methods belong to one event loop.

    A request is in one of three states: on an instance (it has an attempt, or a hand-over), parked
    until an instance takes it, or ended. Each ends exactly once: with its last token, with
    `Rejected`, with an error, or because its client closed it.
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
        logger: logging.Logger = log,
    ) -> None:
        """
        Args:
            clock: seconds, never going back.
            later: calls a function after some seconds of ``clock``.
            on_change: called when an instance came, went, opened or closed.
            timer: measures decisions; ``clock`` if None.
        """
        self.clock = clock
        self.observer = observer
        self._options = options = options or FleetOptions()
        self._on_change = on_change
        self._timer = timer or clock
        self._log = logger
        self._instances = InstanceTable(options.circuit)
        self._requests: dict[str, RoutedRequest] = {}
        self._parking = Parking(later, self._place)
        self.dispatcher = Dispatcher(self._instances.__getitem__, routing)
        self._attempts = Attempts(self.dispatcher, clock)
        kv = KvExchange(self._attempts, options.lease_seconds)
        self._hand_overs = HandOvers(self._attempts, self.dispatcher, self._instances, observer, kv)
        self._moves = DecodeMoves(self._attempts, self.dispatcher, observer, kv)
        self._departures = Departures(self, self._requests, self._moves, later)
        self.shares = KeyShares()
        self._suspects = Suspects(options.most_lost_engines, self._parking.wake_all)
        self._ends = RequestEnds(
            self._requests,
            self._parking,
            self.shares,
            self._attempts,
            self._hand_overs,
            self._moves,
            self._suspects,
            logger,
        )

    # State, for others to look at

    @property
    def instances(self) -> Sequence[FleetInstance]:
        """All instances, connected or not."""
        return self._instances.all

    @property
    def in_flight(self) -> int:
        """Number of requests that have not ended."""
        return len(self._requests)

    @property
    def parked(self) -> int:
        """Number of requests that no instance takes just now."""
        return len(self._parking)

    @property
    def held_seconds(self) -> float:
        """Predicted prefill of all parked requests, in seconds, as if nothing were cached."""
        return self.dispatcher.uncached_seconds(self._parking)

    @property
    def serving(self) -> bool:
        """Whether some instance takes requests."""
        return any(instance.open for instance in self._instances.all)

    def attach(self, link: Link) -> FleetInstance:
        """Add an instance to the fleet, before its link runs.

        Raises:
            ValueError: there is one with the same URL.
        """
        return self._instances.attach(link)

    # Requests

    def submit(
        self,
        request: wire.AddRequest,
        receiver: AnswerReceiver,
        tenant: str,
        chain: Chain | None = None,
    ) -> None:
        """Route a request; its messages go to ``receiver`` until it has ended or is closed.

        Args:
            chain: of the prompt, if the caller knows it.
        """
        chain = Chain(request.prompt, request.cache_scope) if chain is None else chain
        routed = RoutedRequest(with_seed(request), receiver, tenant, chain)
        self._requests[routed.id] = routed
        self._place(routed)

    def close(self, id: str) -> None:
        """End a request whose client left; ids that are unknown or have ended are ignored."""
        request = self._requests.get(id)
        if request is not None:
            self._ends.withdraw(request)

    def place_again(self, id: str) -> None:
        """Take a request back from the instance where it waits, and place it as the fleet is now.

        Requests that have their first token, that are parked, or that are unknown stay as they are.
        """
        request = self._requests.get(id)
        attempt = request.attempt if request is not None else None
        if request is not None and attempt is not None and not attempt.first:
            self.place_anew(request)

    def place_anew(self, request: RoutedRequest) -> None:
        """Take a request from where it is, and place it with its tokens as the fleet is now."""
        self._moves.cancel(request)
        self._hand_overs.drop(request)
        if (attempt := request.attempt) is not None:
            self._attempts.settle(request, attempt)
            self._attempts.send(attempt.instance, wire.AbortRequest(attempt.id))
        self._place(request)

    def fail_all(self, reason: str) -> None:
        """End every request with an error."""
        for request in list(self._requests.values()):
            if request.id in self._requests:
                self._ends.fail(request, reason)

    # LinkEvents

    def connected(self, link: Link, facts: InstanceFacts) -> None:
        instance, now = self._instances.of(link), self.clock()
        if self._instances.connected(instance, facts):
            self.dispatcher.prefixes.clear(instance.name)
        self._suspects.returned(instance)
        self._give_up_guilty()
        if instance.unfit:
            self._log.error("%s must not serve: %s", instance.name, instance.unfit)
            return
        self._log.info("%s is connected (%s)", instance.name, facts.kind)
        self.dispatcher.join(instance, now)
        self._changed()

    def report(self, link: Link, report: InstanceReport) -> None:
        instance = self._instances.of(link)
        before = (instance.open, instance.role)
        instance.report = report
        if instance.unfit:
            return
        self.observer.reported(link, report)
        self.dispatcher.reported(instance, report, self.clock())
        self._departures.reported(instance, report)
        if (instance.open, instance.role) != before:
            self._changed()

    def lost(self, link: Link, reason: str, cause: LossCause) -> None:
        instance, now = self._instances.of(link), self.clock()
        instance.lost(reason)
        self._departures.lost(instance)
        self._moves.lost(instance)
        self._log.warning(
            "lost %s with %d requests: %s", instance.name, len(instance.attempts), reason
        )
        ids, instance.attempts = list(instance.attempts.values()), {}
        if ids:
            instance.circuit.failed(now)
        self.dispatcher.leave(instance)
        self.observer.gone(link)
        self._on_change()
        moving: list[RoutedRequest] = []
        for id in ids:
            if (request := self._requests.get(id)) is None:
                continue  # its client closed it when another one failed
            left = self._hand_overs.lost(request, instance)
            if left is Effect.ORDINARY:
                moving.append(request)
            else:
                self._finish_hand_over(request, left)
        self._suspects.lost(instance, moving, cause, now)
        for request in moving:
            if request.id in self._requests:  # its client may close it when another one fails
                self.observer.moved(instance.name, "lost", bool(request.tokens))
                self._move(request, f"{instance.name} was lost: {reason}")
        self._give_up_guilty()

    def message(self, link: Link, message: wire.RequestAnswer) -> None:
        instance = self._instances.of(link)
        if self._moves.message(instance, message):
            return
        if (request := self._requests.get(instance.attempts.get(message.id, ""))) is None:
            return  # of an attempt that is over
        if isinstance(message, wire.Accepted):
            self._accepted(request, message.cached_tokens)
        elif isinstance(message, wire.Output) and message.finish_reason == "handed_over":
            self._prefilled_for_another(request, message)
        if request.id not in self._requests:
            return  # its client closed it on being told
        if isinstance(message, wire.Output) and message.error and message.fault == "request":
            self._ends.at_fault(request, message)
            return
        left = self._hand_overs.message(request, instance, message)
        if left is not Effect.ORDINARY:
            self._finish_hand_over(request, left)
            return
        attempt = request.attempt
        assert attempt is not None
        if isinstance(message, wire.Output):
            self._output(request, attempt, message)
        elif isinstance(message, wire.Rejected):
            self._rejected(request, attempt, message)

    # Placing

    def _place(self, request: RoutedRequest) -> None:
        """Send a request to an instance, park it, or refuse it."""
        self._parking.leave(request)
        while True:
            now, began, id = self.clock(), self._timer(), request.next_id()
            kept_from = self._suspects.kept_from(request)
            plan = None if kept_from is None else self.dispatcher.plan(request, id, now, kept_from)
            self.observer.decided(self._timer() - began)
            if plan is None:
                self._nowhere(request, now)
                return
            fresh = not request.accepted and not request.failures
            refusal = self.beyond_share(request.tenant, plan, now) if fresh else None
            if refusal is not None:
                self._ends.refuse(request, *refusal)
                return
            if self._sent(request, plan, now):
                return

    def _sent(self, request: RoutedRequest, plan: DispatchPlan, now: float) -> bool:
        instance = plan.instance
        attempt = request.attempt = self._attempts.open(request, plan, now)
        if not self._hand_overs.start(request, attempt, plan.place):
            self._attempts.settle(request, attempt)
            request.avoid[instance.name] = Blame(instance.boot, instance.epoch, now)
            return False
        self._suspects.sent(request, plan.instance)
        self.shares.charge(request.tenant, request.id, plan.place.seconds, now)
        self.observer.dispatched(instance.name, plan.short, plan.place.seconds, now)
        return True

    def beyond_share(self, tenant: str, plan: DispatchPlan, now: float) -> tuple[str, float] | None:
        """Return why a request is refused, and after how many seconds it may be sent again.

        It is refused if the fleet is over its capacity and the tenant has had its part; None if
        not. The observer is told.
        """
        most = self._options.max_predicted_wait
        if most is None or plan.wait <= most:
            return None
        limit = most * self.dispatcher.count()
        if self.shares.entitled(tenant, plan.place.seconds, limit, now):
            return None
        self.observer.refused("share" if tenant else "capacity")
        return f"the fleet has more work than it does in {most:g} s", plan.wait - most

    def _nowhere(self, request: RoutedRequest, now: float) -> None:
        """Refuse, fail or park a request that no instance may have now."""
        if request.stalled is None:
            request.stalled = now
        left = request.stalled + self._options.patience_seconds - now
        retry = min(request.refused.values(), default=inf)
        if not request.accepted and request.refused:
            self.observer.refused("capacity")
            self._ends.refuse(request, "no instance has room for it", retry)
        elif left <= 0:
            self.observer.refused("failures")
            self._ends.fail(request, "no instance is ready")
        else:
            soon = BLAME_SECONDS if request.avoid else left
            self._parking.park(request, min(left, max(min(retry, soon), 0.05)))

    def _changed(self) -> None:
        """Place parked requests, because more may be possible than before."""
        self._on_change()
        self._parking.wake_all()

    # Progress of a request

    def _accepted(self, request: RoutedRequest, cached_tokens: int | None) -> None:
        """Tell the client, once, that the request was accepted."""
        if not request.accepted:
            request.accepted = True
            request.receiver.take(wire.Accepted(request.id, cached_tokens))

    def _prefilled_for_another(self, request: RoutedRequest, output: wire.Output) -> None:
        """Deliver the token of a prefill whose decode is to follow on another instance."""
        attempt = request.attempt
        if attempt is None or request.hand_over is None:
            return
        self._deliver(request, attempt, msgspec.structs.replace(output, finish_reason=None))
        if request.attempt is attempt:
            self.dispatcher.grown(request, attempt)

    def _finish_hand_over(self, request: RoutedRequest, left: Remainder) -> None:
        if left is Effect.PLACE_TOGETHER:
            request.together = True
            self._place(request)

    def _output(self, request: RoutedRequest, attempt: Attempt, output: wire.Output) -> None:
        if output.finish_reason not in ("error", "abort", "handed_over"):
            self._deliver(request, attempt, output)
            return
        if output.tokens:
            tokens = msgspec.structs.replace(output, finish_reason=None, error=None)
            self._deliver(request, attempt, tokens)
        if request.attempt is not attempt:
            return  # its client closed it on the way
        instance, reason = attempt.instance, output.error or "it gave no reason"
        self._log.warning("%s failed request %s: %s", instance.name, request.id, reason)
        instance.circuit.failed(self.clock())
        self.dispatcher.note(instance)
        self.observer.moved(instance.name, "error", bool(request.tokens))
        self._move(request, f"{instance.name} failed it: {reason}", answered=True)

    def _deliver(self, request: RoutedRequest, attempt: Attempt, output: wire.Output) -> None:
        """Give the client tokens, and the end if the output carries it."""
        if not attempt.first and (output.tokens or output.finish_reason):
            attempt.first = True
            self._first(request, attempt, output)
        answer = request.answer(output)
        request.accepted = True
        request.tokens += output.tokens
        if output.finish_reason is not None:
            self.dispatcher.grown(request, attempt)
            self._ends.end(request)
        request.receiver.take(answer)

    def _first(self, request: RoutedRequest, attempt: Attempt, output: wire.Output) -> None:
        """Learn from the first token of an attempt."""
        now = self.clock()
        request.stalled, request.fruitless = None, 0
        self._suspects.cleared(request)
        due = request.original.deadline
        late = None if due is None or request.tokens else now - due
        self.observer.began(attempt, output.cached_tokens, late, now)
        self.dispatcher.prefilled(attempt, output.cached_tokens, now)
        self.shares.discharge(request.tenant, request.id, now)
        if attempt.instance.circuit.succeeded():
            self.dispatcher.note(attempt.instance)
            self._changed()

    def _rejected(self, request: RoutedRequest, attempt: Attempt, rejected: wire.Rejected) -> None:
        """Try the other instances; only if none takes the request, its client is told."""
        instance = attempt.instance
        self._attempts.settle(request, attempt)
        self.observer.moved(instance.name, "refused", bool(request.tokens))
        if rejected.retry_after is None:
            request.refused.update(dict.fromkeys(self._instances.alike(instance), inf))
            if all(i.name in request.refused for i in self.instances if i.open):
                self._ends.reject(request, rejected)
                return
        else:
            request.refused[instance.name] = rejected.retry_after
        self._place(request)

    # Failures and ends

    def _give_up_guilty(self) -> None:
        """End the requests that are known to have cost too many instances."""
        for request in self._suspects.guilty():
            if request.id in self._requests:  # its client may close it when another one fails
                self.observer.refused("failures")
                end = given_up(request)
                log_failure(self._log, request, end.error or "")
                self._ends.at_fault(request, end)

    def _move(self, request: RoutedRequest, reason: str, *, answered: bool = False) -> None:
        """Place a request again that an instance failed, or end it if that happened too often."""
        self._moves.cancel(request)
        attempt, now = request.attempt, self.clock()
        if attempt is not None:
            instance = attempt.instance
            request.avoid[instance.name] = Blame(instance.boot, attempt.epoch, now)
            self._attempts.settle(request, attempt)
        request.failures.append(reason)
        request.fruitless, request.stalled = request.fruitless + 1, now
        if request.failed_too_often(self._options.most_failures):
            self.observer.refused("failures")
            told = f"given up after {len(request.failures)} failures; the router's log has them"
            self._ends.fail(request, told, answered=answered)
            return
        request.refused.clear()
        self._place(request)
