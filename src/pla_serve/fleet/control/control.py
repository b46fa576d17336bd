"""Asks the pool controllers once in a control period, and sends instances their roles."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pla_serve.fleet.control.census import Census
from pla_serve.fleet.control.demand import DemandMeter, Desired
from pla_serve.fleet.link.protocol import InstanceReport, Link
from pla_serve.policy.pools import protocol
from pla_serve.policy.pools.protocol import Move, Pool, PoolController
from pla_serve.policy.pools.stages import StageController

log = logging.getLogger(__name__)

REMEMBERED_MOVES = 50


@dataclass(frozen=True, slots=True)
class ControlOptions:
    """Times of the control of pools.

    Raises:
        ValueError: a field is not positive.
    """

    period_seconds: float = 1.0
    """Seconds between two decisions."""
    settle_seconds: float = 3.0
    """Seconds after which a role is sent again that an instance has not confirmed."""

    def __post_init__(self) -> None:
        for name in ("period_seconds", "settle_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Moved:
    """A move that was made, with its time."""

    at: float
    move: Move


class FleetControl:
    """Moves instances between the roles short, long and decode, and says how many there should be.

    A move sends an instance its new role. The router routes new requests by role, and an instance
    finishes the requests that it has, so no request is dropped. Instances of role mixed are never
    moved. An instance that restarts gets its assigned role again. All methods belong to one event
    loop; times are seconds on one monotonic clock.

    Args:
        links: all instances of the fleet, connected or not.
        controller: of the pools short and long; None moves nothing, and only the signal is kept.
    """

    def __init__(
        self,
        links: Callable[[], Iterable[Link]],
        controller: PoolController | None,
        options: ControlOptions | None = None,
        *,
        stages: StageController | None = None,
        meter: DemandMeter | None = None,
        name: str = "off",
        on_decision: Callable[[FleetControl], None] = lambda control: None,
    ) -> None:
        """
        Args:
            name: name of the controller, for people.
            on_decision: called after each decision.
        """
        self.name = name
        self._on_decision = on_decision
        self.options = options or ControlOptions()
        self.moves: deque[Moved] = deque(maxlen=REMEMBERED_MOVES)
        """The last moves, oldest first."""
        self.moves_total = 0
        self.desired: Desired | None = None
        """Number of instances that there should be, as of the last decision."""
        self._links = links
        self._controller = controller
        self._stages = stages or StageController()
        self._meter = meter or DemandMeter()
        self._census = Census()
        self._assigned: dict[str, Pool] = {}
        self._told_at: dict[str, float] = {}
        self._decodes = False
        """Whether there is or was a decode pool."""

    # What happens meanwhile

    def report(self, link: Link, report: InstanceReport) -> None:
        """Take a report of an instance."""
        self._census.report(link.url, report)

    def lost(self, link: Link) -> None:
        self._census.forget(link.url)

    def dispatched(self, short: bool, seconds: float, now: float) -> None:
        """Count a request that was sent to an instance, with ``seconds`` of predicted prefill."""
        pool = Pool.SHORT if short else Pool.LONG
        self._meter.arrived(pool, seconds, now)
        if self._controller is not None:
            self._controller.arrived(pool, seconds, now)

    def first_token(self, url: str, lateness: float) -> None:
        """Count a first token that came ``lateness`` seconds after its deadline."""
        self._census.first_token(url, lateness)

    # Decisions

    def tick(self, now: float, held_seconds: float = 0.0) -> Sequence[Move]:
        """Decide on moves and send instances their new roles.

        Args:
            held_seconds: predicted prefill of requests that the router itself holds back.
        """
        links = {link.url: link for link in self._links() if _is_there(link)}
        reports = [self._census.close(link, self._pool(link, now)) for link in links.values()]
        self._decodes = self._decodes or any(r.pool is Pool.DECODE for r in reports)
        self.desired = self._meter.desired(now, reports, held_seconds)
        moves = self._decide(now, reports)
        for move in moves:
            self._make(move, links[move.instance_id], now)
        self._on_decision(self)
        return moves

    def _decide(self, now: float, reports: list[protocol.PoolReport]) -> Sequence[Move]:
        if self._controller is None:
            return ()
        moves: list[Move] = []
        if self._decodes and len(reports) > 1:
            moves += self._stages.decide(reports, self._meter.demands(reports))
        moved = {move.instance_id: move.target for move in moves}
        rest = [replace(r, pool=moved.get(r.id, r.pool)) for r in reports]
        # The class controller may not move one that has just been moved between the stages.
        moves += [m for m in self._controller.decide(now, rest) if m.instance_id not in moved]
        return moves

    def _make(self, move: Move, link: Link, now: float) -> None:
        log.info("%s: from %s to %s", link.url, move.source.value, move.target.value)
        self._assigned[link.url] = move.target
        self._census.moved(link.url, move.source)
        self._tell(link, move.target, now)
        self.moves.append(Moved(now, move))
        self.moves_total += 1

    def _pool(self, link: Link, now: float) -> Pool:
        """Return the pool of an instance: the role that was sent to it, from that moment on."""
        assert link.last_report is not None
        reported = Pool(link.last_report.role)
        assigned = self._assigned.get(link.url)
        if assigned is None:
            return reported
        if (
            reported is not assigned
            and now - self._told_at[link.url] >= self.options.settle_seconds
        ):
            self._tell(link, assigned, now)
        return assigned

    def _tell(self, link: Link, pool: Pool, now: float) -> None:
        self._told_at[link.url] = now
        link.set_role(pool.value)


def _is_there(link: Link) -> bool:
    """Whether an instance takes requests: connected, has reported, and is not ending."""
    report = link.last_report
    return link.connected and report is not None and report.ready and not report.draining
