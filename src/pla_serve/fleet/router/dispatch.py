"""Which instance a request is sent to, and the accounts of what was sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pla_serve.fleet.link.protocol import InstanceReport
from pla_serve.fleet.router.costs import FleetCost
from pla_serve.fleet.router.fleet_instance import FleetInstance
from pla_serve.fleet.router.prefixes import PrefixRecord
from pla_serve.fleet.router.routed_request import Attempt, RoutedRequest
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.protocol import ServiceLevel
from pla_serve.policy.routing.class_pools import ClassPools
from pla_serve.policy.routing.least_loaded import LeastLoaded
from pla_serve.policy.routing.predicted import Predicted
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.policy.routing.request import FleetModel, NoInstance, RouteRequest
from pla_serve.policy.routing.router import Placement, Router
from pla_serve.policy.routing.view import FleetView

TRANSIT_SECONDS = 0.005
"""Seconds that a message to an instance may take: what was sent so shortly before the instance
counted its queue is not counted in it."""
NOBODY: frozenset[str] = frozenset()
BLAME_SECONDS = 1.0
"""Seconds for which a request never goes back to an instance that failed it, even if there is no
other."""


class ByRoles:
    """Class pools while there are short or long instances, predicted first tokens otherwise."""

    def __init__(self) -> None:
        self._pools = ClassPools()
        self._mixed = Predicted()

    def choose(self, request: RouteRequest, view: FleetView, pool: Pool | None, now: float) -> int:
        """Choose by class pools if there are short or long instances, else by predicted TTFT."""
        classes = any(entry.pool is not Pool.MIXED for entry in view.entries)
        policy: RoutingPolicy = self._pools if classes else self._mixed
        return policy.choose(request, view, pool, now)


@dataclass(frozen=True, slots=True)
class DispatchPlan:
    """Where a request would go, and what it would find there. Seconds are predicted."""

    instance: FleetInstance
    stage: Router
    numbers: RouteRequest
    place: Placement
    wait: float
    """Seconds until the prefill begins."""
    short: bool
    alone: bool
    """Whether no other request waits on the instance."""


class Dispatcher:
    """Chooses instances by a routing policy, and keeps what that policy knows of the fleet.

    Decode instances are a stage of their own. They get whole requests only if no other instance can
    take them.
    """

    def __init__(
        self,
        instances: Callable[[str], FleetInstance],
        routing: RoutingPolicy | None = None,
    ) -> None:
        """
        Args:
            instances: by name.
            routing: None is `ByRoles`.
        """
        self.cost = FleetCost()
        self.prefixes = PrefixRecord()
        self._instances = instances
        self._transfers: dict[str, str | None] = {}
        """KV that each instance can exchange, by name (`InstanceFacts.transfer`)."""
        self._express: dict[str, bool] = {}
        self._prefill = Router(routing or ByRoles(), self._model())
        self._decode = Router(LeastLoaded("tokens"), self._model())
        self._odd: dict[str, FleetInstance] = {}
        """Connected instances that get no requests, or only a probe: not open, or circuit not
        closed."""
        self._forgetful: set[str] = set()
        """Instances that cannot continue a stream with exactly the same tokens
        (`InstanceFacts.resumes`)."""

    # Instances

    def join(self, instance: FleetInstance, now: float) -> None:
        """Add an instance that is connected and whose facts are known."""
        facts = instance.facts
        assert facts is not None
        self.prefixes.join(instance.name, facts.kv_tokens)
        self._express[instance.name] = facts.express
        self._transfers[instance.name] = facts.transfer
        self.cost.kv_bytes_per_token = facts.kv_bytes_per_token
        if facts.resumes:
            self._forgetful.discard(instance.name)
        else:
            self._forgetful.add(instance.name)
        self._stage(instance).added(instance.name, instance.pool, now)
        self._renew()
        self.note(instance)

    def leave(self, instance: FleetInstance) -> None:
        """Remove an instance that was lost, with all accounts there."""
        for stage in (self._prefill, self._decode):
            if instance.name in stage.view:
                stage.removed(instance.name)
        self._odd.pop(instance.name, None)
        self._express.pop(instance.name, None)
        self._transfers.pop(instance.name, None)
        self.cost.gone(instance.name)

    def reported(self, instance: FleetInstance, report: InstanceReport, now: float) -> None:
        """Take over a new report: role, memory, costs and queue."""
        name = instance.name
        stage = self._stage(instance)
        if name not in stage.view:
            other = self._decode if stage is self._prefill else self._prefill
            if name in other.view:
                other.removed(name)
                stage.added(name, instance.pool, now)
        elif stage.view.entry(name).pool is not instance.pool:
            stage.moved(name, instance.pool)
        if report.kv_tokens and instance.facts and report.kv_tokens != instance.facts.kv_tokens:
            self.prefixes.join(name, report.kv_tokens)
        if self.cost.said(name, report.load.cost, report.load.boundary_tokens, now):
            self._renew()
        if report.load.cost is not None:
            short = report.load.queued_short_seconds
            at = now - report.age - TRANSIT_SECONDS
            stage.reported(name, report.load.queued_seconds, short, at)
        self.note(instance)

    def note(self, instance: FleetInstance) -> None:
        """Note that an instance opened or closed, or that its circuit did."""
        if instance.open and instance.circuit.closed:
            self._odd.pop(instance.name, None)
        elif instance.connected:
            self._odd[instance.name] = instance

    def count(self) -> int:
        """Return the number of instances that prefill; if there are none, of all."""
        return len(self._prefill.view) or len(self._decode.view)

    # Requests

    def plan(
        self,
        request: RoutedRequest,
        id: str,
        now: float,
        kept_from: frozenset[str] = frozenset(),
    ) -> DispatchPlan | None:
        """Return the plan to send a request to the best instance; None if no instance may have it.

        Args:
            kept_from: instances that may not.
        """
        numbers = self._route_request(request, id)
        for exclude in self._exclusions(request, now):
            for stage in (self._prefill, self._decode):
                if not stage.view.entries:
                    continue
                try:
                    name = stage.choose(numbers, now, exclude | kept_from)
                except NoInstance:
                    continue
                return self._plan(stage, numbers, name, now)
        return None

    def plan_at(
        self, request: RoutedRequest, id: str, instance: FleetInstance, now: float
    ) -> DispatchPlan:
        """Return the plan to send a request to an instance that somebody else has chosen."""
        numbers = self._route_request(request, id)
        return self._plan(self._stage(instance), numbers, instance.name, now)

    def cached(self, request: RoutedRequest) -> dict[str, int]:
        """Return what instances are believed to hold of a request's tokens, by name."""
        request.extend_chain()
        return self.prefixes.match(request.chain)

    def charge(self, request: RoutedRequest, plan: DispatchPlan, now: float) -> Attempt:
        """Charge a request that is sent as planned, and return its attempt."""
        instance = plan.instance
        plan.stage.dispatched(plan.numbers, instance.name, now)
        place = plan.place
        return Attempt(
            instance,
            plan.numbers.id,
            now,
            instance.epoch,
            self.prefixes.insert(instance.name, request.chain),
            len(request.chain.hashes),
            place.history,
            plan.wait + place.seconds,
            (place.new_tokens, place.history) if plan.alone else None,
            place.fetch_tokens if place.fetch_from is not None else 0,
        )

    def prefilled(self, attempt: Attempt, cached_tokens: int | None, now: float) -> None:
        """Take over that the first token of an attempt has come, and learn from its time."""
        self._prefill.prefilled(attempt.id, now)
        if attempt.mark is not None:
            self.prefixes.confirm(attempt.instance.name, attempt.mark, cached_tokens)
            attempt.mark = None
        if attempt.alone is None:
            return
        if attempt.fetched:
            rest = self.cost.prefill_seconds(*attempt.alone)
            self.cost.fetched(attempt.fetched, now - attempt.sent - rest)
        else:
            self.cost.saw(attempt.id, *attempt.alone, now - attempt.sent)

    def grown(self, request: RoutedRequest, attempt: Attempt) -> None:
        """Note that the instance also keeps the KV of the output."""
        request.extend_chain()
        self.prefixes.extend(attempt.instance.name, request.chain, attempt.blocks)

    def finished(self, attempt: Attempt, now: float) -> None:
        """Take an attempt that has ended, for any reason, off all accounts."""
        self._prefill.finished(attempt.id, now)
        self._decode.finished(attempt.id, now)
        if attempt.mark is not None:
            self.prefixes.undo(attempt.instance.name, attempt.mark)
            attempt.mark = None

    def outstanding(self, name: str) -> tuple[int, float]:
        """Return the number of requests on an instance, and their seconds of waiting prefill."""
        for stage in (self._prefill, self._decode):
            if name in stage.view:
                entry = stage.view.entry(name)
                return len(entry.waiting) + len(entry.running), entry.work
        return 0, 0.0

    def plan_decode(
        self, request: RoutedRequest, id: str, exclude: set[str], now: float
    ) -> DispatchPlan | None:
        """Return the plan to hand a prefilled request to the least loaded decode instance."""
        if not self._decode.view.entries:
            return None
        numbers = self._route_request(request, id)
        closed = {n for n, i in self._odd.items() if not i.open or not i.circuit.allows(now)}
        avoided = {n for n, b in request.avoid.items() if self._instances(n).boot == b.boot}
        try:
            name = self._decode.choose(numbers, now, frozenset(exclude | closed | avoided))
        except NoInstance:
            return None
        return self._plan(self._decode, numbers, name, now)

    def uncached_seconds(self, requests: Iterable[RoutedRequest]) -> float:
        """Return the predicted prefill of all tokens of some requests, in seconds."""
        return sum(self.cost.prefill_seconds(request.known_tokens, 0) for request in requests)

    @property
    def charges(self) -> int:
        """Number of requests on all accounts."""
        return int(self._prefill.view.requests.sum() + self._decode.view.requests.sum())

    def _route_request(self, request: RoutedRequest, id: str) -> RouteRequest:
        request.extend_chain()
        cached = {} if request.scoring else self.prefixes.match(request.chain)
        for name, tokens in cached.items():
            facts = self._instances(name).facts
            if facts is not None and facts.block_tokens > 1:
                cached[name] = tokens - tokens % facts.block_tokens
        tokens = request.known_tokens
        asked, common = request.original, request.chain.common
        bulk = asked.service is ServiceLevel.BULK
        return RouteRequest(id, tokens, cached, common, asked.deadline, bulk)

    def _exclusions(self, request: RoutedRequest, now: float) -> Iterator[frozenset[str]]:
        """Yield sets of instances to leave out, the largest first.

        It holds all that should not have the request; later sets hold only those that cannot have
        it.
        """
        if not (self._odd or request.refused or request.avoid or request.tokens):
            yield NOBODY
            return
        never = {name for name, instance in self._odd.items() if not instance.open}
        never |= request.refused.keys()
        rather_not: set[str] = set()
        for name, blame in request.avoid.items():
            instance = self._instances(name)
            if instance.boot == blame.boot:
                just = instance.epoch == blame.epoch and now - blame.at < BLAME_SECONDS
                (never if just else rather_not).add(name)
        if request.tokens:
            rather_not |= self._forgetful
        barred = {name for name, instance in self._odd.items() if not instance.circuit.allows(now)}
        yield frozenset(never | rather_not | barred)
        if barred:
            yield frozenset(never | rather_not)
        if rather_not:
            yield frozenset(never)

    def _plan(self, stage: Router, numbers: RouteRequest, name: str, now: float) -> DispatchPlan:
        place = stage.place(numbers, name)
        view, entry = stage.view, stage.view.entry(name)
        short = view.is_short(numbers, place.new_tokens)
        wait = view.wait(entry.index, short, now)
        return DispatchPlan(
            self._instances(name), stage, numbers, place, wait, short, not entry.waiting
        )

    def _stage(self, instance: FleetInstance) -> Router:
        return self._decode if instance.pool is Pool.DECODE else self._prefill

    def _model(self) -> FleetModel:
        kinds = set(self._transfers.values())
        fetch = len(self._transfers) > 1 and len(kinds) == 1 and None not in kinds
        return FleetModel(
            self.cost.prefill_seconds,
            self.cost.boundary_tokens,
            express=bool(self._express) and all(self._express.values()),
            transfer_seconds=self.cost.transfer_seconds if fetch else None,
            launch_seconds=self.cost.launch_seconds,
        )

    def _renew(self) -> None:
        self._prefill.view.model = self._decode.view.model = self._model()
