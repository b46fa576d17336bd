"""A pool controller in seconds of work, which answers a burst within one control period."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, inf
from typing import Annotated

from pla_serve.policy.declare import Kind
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pools.protocol import Move, Pool, PoolController, PoolReport, other_class
from pla_serve.policy.pools.rates import WorkRate


@dataclass(frozen=True, slots=True)
class BalanceOptions:
    """Knobs of `BalanceController`.

    Raises:
        ValueError: a field is out of range.
    """

    horizon_seconds: Annotated[
        float,
        Knob(
            "A pool is large enough if it keeps up with its arrivals and clears its backlog in "
            "this time. Longer than a control period and a drain, or the controller chases its "
            "own effect.",
            unit="seconds",
            above=0,
        ),
    ] = 10.0
    memory_seconds: Annotated[
        float,
        Knob(
            "How far back the arrival rate looks while it does not change.",
            unit="seconds",
            above=0,
        ),
    ] = 30.0
    dead_band: Annotated[
        float,
        Knob(
            "Share by which a new split must lower the worst demand an instance.",
            least=0,
            below=1,
        ),
    ] = 0.1
    min_instances: Annotated[
        int, Knob("A pool of this size gives none away.", unit="instances", least=1)
    ] = 1
    short_load: Annotated[
        float,
        Knob(
            "Most that short instances are to be busy with prefills: their decode steps need time "
            "too, and random arrivals room.",
            above=0,
            most=1,
        ),
    ] = 0.7
    long_load: Annotated[
        float,
        Knob("Most that long instances may be busy for the sake of that room.", above=0, most=1),
    ] = 0.9

    def __post_init__(self) -> None:
        check_knobs(self)


@dataclass(frozen=True, slots=True)
class ClassDemand:
    """Demand of one class on its pool."""

    queued: float
    """Predicted seconds of the prefills that wait or run."""
    rate: float
    """Predicted seconds of prefill that arrive per second."""

    def instances(self, horizon: float) -> float:
        """Return the instances that keep up and clear the backlog in ``horizon`` seconds."""
        return self.rate + self.queued / horizon

    def recovery(self, instances: int) -> float:
        """Return the seconds in which so many instances clear the backlog; infinite if never."""
        if not self.queued:
            return 0.0
        return self.queued / (instances - self.rate) if instances > self.rate else inf


class BalanceController:
    """Moves at once to the split of instances that minimises the largest demand per instance.

    The demand of a class is ``d = rate + queued / horizon`` instances. Shorts ask for
    ``d / short_load``, but where the fleet keeps up with both classes they leave longs
    ``rate / long_load`` if they can do without. Longs ask for their demand, but for no more than
    shorts leave them (for their rate at least, where the fleet keeps up with both): a backlog of
    longs waits, and does not take the shorts with it. So on a few nearly full instances of which no
    split holds both classes it is longs that fall behind. Of all splits of n instances, the one
    that minimises ``max(a_s / n_s, a_l / n_l)``, with a for what is asked, is an integer next to
    ``n a_s / (a_s + a_l)``; of the two, one that keeps up with both rates is better than one that
    does not. As many instances move at once as it takes. Nothing moves

    - while both pools are large enough, ``a <= n``: spare instances stay where they are;
    - unless the worst demand an instance falls by ``dead_band``, or falls and both rates are kept
      up with then as they are not now. Under demands that do not change the first decision is
      therefore the last;
    - that would be free only after the pool that it goes to has recovered without it.

    Feedback does not make it swing either: the backlog counts with 1 / horizon, so that a change
    takes effect within the horizon and not within a period.
    """

    def __init__(self, options: BalanceOptions | None = None) -> None:
        self._options = options or BalanceOptions()
        memory = self._options.memory_seconds
        self._rates = {pool: WorkRate(memory) for pool in (Pool.SHORT, Pool.LONG)}

    def arrived(self, pool: Pool, seconds: float, now: float) -> None:
        """Counts towards the rate of its class.

        Raises:
            ValueError: ``pool`` is neither SHORT nor LONG, or ``seconds`` is not a size.
        """
        other_class(pool)
        self._rates[pool].add(seconds, now)

    def decide(self, now: float, instances: Sequence[PoolReport]) -> Sequence[Move]:
        """All moves to the best split, fewest seconds to drain first."""
        demands = self._demands(now, instances)
        sizes = {pool: sum(r.pool is pool for r in instances) for pool in demands}
        asked = self._asked(demands, sum(sizes.values()))
        target = self._target(demands, asked, sizes)
        change = target - sizes[Pool.SHORT]
        if change == 0:
            return ()
        least = self._options.min_instances
        repair = min(sizes.values()) < least  # instances failed: no class may be left without
        if not repair and not self._worth_it(demands, asked, sizes, target):
            return ()
        receiver = Pool.SHORT if change > 0 else Pool.LONG
        limit = inf if repair else demands[receiver].recovery(sizes[receiver])
        donors = sorted(
            (r for r in instances if r.pool is other_class(receiver) and r.drain_seconds < limit),
            key=lambda report: (report.drain_seconds, report.id),
        )
        return tuple(Move(r.id, r.pool, receiver) for r in donors[: abs(change)])

    def demands(self, instances: Sequence[PoolReport]) -> dict[Pool, ClassDemand]:
        """Both classes as of now, with the rates of the last `decide`; for metrics and scaling."""
        return {
            Pool.SHORT: ClassDemand(
                sum(r.queued_short for r in instances), self._rates[Pool.SHORT].rate
            ),
            Pool.LONG: ClassDemand(
                sum(r.queued_long for r in instances), self._rates[Pool.LONG].rate
            ),
        }

    def _demands(self, now: float, instances: Sequence[PoolReport]) -> dict[Pool, ClassDemand]:
        for rate in self._rates.values():
            rate.close(now)
        return self.demands(instances)

    def _target(
        self, demands: dict[Pool, ClassDemand], asked: tuple[float, float], sizes: dict[Pool, int]
    ) -> int:
        """The best number of short instances; the present one if nothing speaks against it."""
        total, present, least = sum(sizes.values()), sizes[Pool.SHORT], self._options.min_instances
        if total < 2 * least:
            return present
        short, long = asked
        if short + long == 0:
            return min(max(present, least), total - least)
        ideal = floor(total * short / (short + long))
        candidates = {min(max(n, least), total - least) for n in (ideal, ideal + 1)}
        return min(
            sorted(candidates),
            key=lambda n: (
                not _keeps_up(demands, n, total - n),
                max(short / n, long / (total - n)),
                abs(n - present),
            ),
        )

    def _asked(self, demands: dict[Pool, ClassDemand], total: int) -> tuple[float, float]:
        """Return the instances that short prefills ask for, and those that long ones ask for."""
        options, horizon = self._options, self._options.horizon_seconds
        short, long = (demands[pool].instances(horizon) for pool in (Pool.SHORT, Pool.LONG))
        wanted, least = short / options.short_load, float(options.min_instances)
        rate = demands[Pool.LONG].rate
        if demands[Pool.SHORT].rate + rate <= total:  # the fleet keeps up with both
            wanted = min(wanted, max(short, total - rate / options.long_load))
            least = rate
        return wanted, min(long, max(total - wanted, least))

    def _worth_it(
        self,
        demands: dict[Pool, ClassDemand],
        asked: tuple[float, float],
        sizes: dict[Pool, int],
        target: int,
    ) -> bool:
        short, long = asked
        others = sum(sizes.values()) - target
        before = max(short / sizes[Pool.SHORT], long / sizes[Pool.LONG])
        after = max(short / target, long / others)
        gains = _keeps_up(demands, target, others) > _keeps_up(demands, *sizes.values())
        margin = 0.0 if gains else self._options.dead_band
        return before > 1 and after <= (1 - margin) * before


def _keeps_up(demands: dict[Pool, ClassDemand], short: int, long: int) -> bool:
    """Whether so many instances keep up with the arrivals of both classes."""
    return demands[Pool.SHORT].rate <= short and demands[Pool.LONG].rate <= long


CONTROLLER: Kind[PoolController] = Kind(
    name="balance",
    summary="the project's own: as many moves at once as the demands of the classes call for",
    make=BalanceController,
    options=BalanceOptions,
)
