"""Which replica gets a request: the decision of a fleet's router, on what Ray says of replicas."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated

import msgspec

from pla_serve.fleet.router.costs import FleetCost
from pla_serve.fleet.router.dispatch import ByRoles
from pla_serve.fleet.router.prefixes import Chain, PrefixMark, PrefixRecord
from pla_serve.policy.cost import CostProfile
from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.policy.routing.request import FleetModel, NoInstance, RouteRequest
from pla_serve.policy.routing.router import Router
from pla_serve.wire.codec import MessageDecoder, WireError, encode
from pla_serve.wire.link import InstanceFacts, InstanceReport

STATS = "pla_serve"
"""Key of `ReplicaStats` among the routing statistics of a replica."""
MOST_AGE = 60.0
"""Seconds beyond which the age of statistics is taken for a clock that is wrong."""
DEFAULT_ROUTING = "auto"
Epoch = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"""Seconds since the epoch."""


class ReplicaStats(msgspec.Struct, frozen=True):
    """What a replica says of itself, through Ray's controller, to all routers."""

    facts: InstanceFacts
    report: InstanceReport
    at: Epoch
    """When it was said: seconds since the epoch, because the nodes have no other clock in common.
    Work that was sent there later is added to what it reports."""


_read_stats = MessageDecoder[ReplicaStats](ReplicaStats)


def pack_stats(stats: ReplicaStats) -> dict[str, bytes]:
    """Return the routing statistics of a replica, as its ``record_routing_stats`` does."""
    return {STATS: encode(stats)}


def unpack_stats(stats: object) -> ReplicaStats | None:
    """Return what a replica says of itself; None if it is of another kind, or says nonsense."""
    packed = stats.get(STATS) if isinstance(stats, dict) else None
    try:
        return _read_stats(packed) if isinstance(packed, bytes) else None
    except WireError:
        return None


@dataclass(frozen=True, slots=True)
class RoutedPrompt:
    """A prompt as the decision sees it."""

    tokens: int
    """Length of the prompt, at least 1."""
    chain: Chain
    deadline: float | None = None
    """When its first token is due, on the router's clock."""
    told: bool = True
    """Whether `ReplicaChoice.first_token` will be called. Otherwise the first token is taken to
    come when it is predicted to."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Where a request goes, and what it is predicted to cost there."""

    replica: str
    seconds: float
    """Predicted time of the prefill, without waiting."""
    short: bool


@dataclass(slots=True)
class _Charge:
    replica: str
    mark: PrefixMark | None
    told: bool


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What is taken for true of replicas that report nothing, as those of other engines.

    Raises:
        ValueError: a field is out of range.
    """

    tokens_per_second: float = 10_000.0
    """Speed of prefill on one replica. Only its ratio to the real one matters, and little: too low
    a number spreads requests more, too high a one follows cached prefixes more."""
    boundary_tokens: int = 256
    """A request with at most so many new tokens is short."""
    express: bool = False
    """Short requests do not wait for long ones on the same replica."""

    def __post_init__(self) -> None:
        if not 0 < self.tokens_per_second < float("inf"):
            raise ValueError(f"tokens_per_second must be positive, not {self.tokens_per_second}")
        if self.boundary_tokens < 0:
            raise ValueError(f"boundary_tokens must be at least 0, not {self.boundary_tokens}")

    @property
    def profile(self) -> CostProfile:
        """The same as a cost profile."""
        return CostProfile(1 / self.tokens_per_second, 0.0, 0.0, 0.0, 0.0)


class ReplicaChoice:
    """Chooses a replica for each request, and keeps the accounts that choices go by.

    The life of a request: `choose`, `first_token`, `ended`. Requests that are not known are ignored
    everywhere. All methods belong to one event loop.

    Args:
        routing: a routing policy; None is class pools while there are short or long replicas, and
            predicted first tokens otherwise, as ``pla-serve route`` has it.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        routing: RoutingPolicy | None = None,
        assumed: Assumptions | None = None,
    ) -> None:
        self._clock = clock
        self._assumed = assumed or Assumptions()
        self._cost = FleetCost()
        self._cost.said("", self._assumed.profile, self._assumed.boundary_tokens, clock())
        self._prefixes = PrefixRecord()
        self._stats: dict[str, ReplicaStats] = {}
        self._router = Router(routing or ByRoles(), self._model())
        self._charges: dict[str, _Charge] = {}
        self._expected: list[tuple[float, str]] = []
        """Predicted first tokens of requests that nobody tells of, soonest first."""

    @property
    def requests(self) -> int:
        """Number of requests on all accounts."""
        return len(self._charges)

    # Replicas

    def keep(self, replicas: Collection[str]) -> None:
        """Take over which replicas there are; what was charged to others is forgotten."""
        now, view = self._clock(), self._router.view
        for name in [entry.id for entry in view.entries if entry.id not in replicas]:
            for id in self._router.removed(name):
                self._charges.pop(id, None)
            self._prefixes.leave(name)
            self._stats.pop(name, None)
            self._cost.gone(name)
        for name in replicas:
            if name not in view:
                self._router.added(name, Pool.MIXED, now)
                self._prefixes.join(name, 0)
        self._router.view.model = self._model()

    def said(self, name: str, stats: ReplicaStats, wall: float) -> None:
        """Take over what a replica says; what is known already, or of no replica, is ignored.

        Args:
            wall: seconds since the epoch.
        """
        before, view = self._stats.get(name), self._router.view
        if name not in view or (before is not None and before.at >= stats.at):
            return
        self._stats[name] = stats
        now, report, facts = self._clock(), stats.report, stats.facts
        if before is None or before.facts.boot != facts.boot:
            self._prefixes.clear(name)
        self._prefixes.join(name, report.kv_tokens or facts.kv_tokens)
        pool = Pool(report.role)
        if view.entry(name).pool is not pool:
            self._router.moved(name, pool)
        load = report.load
        if load.cost is not None:
            self._cost.gone("")  # the assumption: now there is something to go by
            at = now - min(max(wall - stats.at + report.age, 0.0), MOST_AGE)
            self._router.reported(name, load.queued_seconds, load.queued_short_seconds, at)
        self._cost.said(name, load.cost, load.boundary_tokens, now)
        view.model = self._model()

    # Requests

    def choose(
        self,
        id: str,
        prompt: RoutedPrompt,
        candidates: Collection[str],
        leave_out: Collection[str] = (),
    ) -> Chosen | None:
        """Charge a request to the best of some replicas; None if none of them is known.

        A request that was charged before is charged anew.

        Args:
            candidates: replicas that may have it.
            leave_out: of these, replicas that get it only if no other can.
        """
        now = self._clock()
        self.ended(id)
        self._assume_firsts(now)
        barred = {entry.id for entry in self._router.view.entries} - set(candidates)
        closed = {name for name, stats in self._stats.items() if not _open(stats.report)}
        numbers = RouteRequest(
            id, prompt.tokens, self._cached(prompt.chain), prompt.chain.common, prompt.deadline
        )
        for exclude in (barred | closed | set(leave_out), barred | closed, barred):
            try:
                name = self._router.choose(numbers, now, exclude)
            except NoInstance:
                continue
            return self._charge(numbers, name, prompt, now)
        return None

    def charged_to(self, id: str) -> str | None:
        """Return the replica to which a request is charged; None if it is on no account."""
        charge = self._charges.get(id)
        return None if charge is None else charge.replica

    def sent(self, id: str, name: str, prompt: RoutedPrompt) -> None:
        """Note where a request really went, if Ray could not send it where it was chosen to go."""
        if self.charged_to(id) == name:
            return
        self.ended(id)
        if name in self._router.view:
            numbers = RouteRequest(id, prompt.tokens, self._cached(prompt.chain))
            self._charge(numbers, name, prompt, self._clock())

    def first_token(self, id: str, cached_tokens: int | None) -> None:
        """Note that a prefill has ended.

        Args:
            cached_tokens: of its prompt, as the replica says; None if it does not.
        """
        charge = self._charges.get(id)
        if charge is None:
            return
        self._router.prefilled(id, self._clock())
        if charge.mark is not None:
            self._prefixes.confirm(charge.replica, charge.mark, cached_tokens)
            charge.mark = None

    def ended(self, id: str, replica: str | None = None) -> None:
        """Take a request off the accounts.

        Args:
            replica: the one where it has ended. If it is charged to another one by now, it stays.
        """
        charge = self._charges.get(id)
        if charge is None or (replica is not None and charge.replica != replica):
            return
        if replica is not None and not charge.told:
            self.first_token(id, None)  # sooner than predicted
        del self._charges[id]
        self._router.finished(id, self._clock())
        if charge.mark is not None:
            self._prefixes.undo(charge.replica, charge.mark)

    def _charge(self, numbers: RouteRequest, name: str, prompt: RoutedPrompt, now: float) -> Chosen:
        view = self._router.view
        place = self._router.place(numbers, name)
        short = view.is_short(numbers, place.new_tokens)
        if not prompt.told:
            wait = view.wait(view.entry(name).index, short, now)
            heapq.heappush(self._expected, (now + wait + place.seconds, numbers.id))
        self._router.dispatched(numbers, name, now)
        self._charges[numbers.id] = _Charge(
            name, self._prefixes.insert(name, prompt.chain), prompt.told
        )
        return Chosen(name, place.seconds, short)

    def _assume_firsts(self, now: float) -> None:
        while self._expected and self._expected[0][0] <= now:
            self.first_token(heapq.heappop(self._expected)[1], None)

    def _cached(self, chain: Chain) -> dict[str, int]:
        cached = self._prefixes.match(chain)
        for name, tokens in cached.items():
            stats = self._stats.get(name)
            if stats is not None:
                cached[name] = tokens - tokens % stats.facts.block_tokens
        return cached

    def _model(self) -> FleetModel:
        said = [stats.facts.express for stats in self._stats.values()]
        return FleetModel(
            self._cost.prefill_seconds,
            self._cost.boundary_tokens,
            express=all(said) if said else self._assumed.express,
            launch_seconds=self._cost.launch_seconds,
        )


def _open(report: InstanceReport) -> bool:
    return report.ready and not report.draining
