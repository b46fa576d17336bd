"""The published instance-pressure controller (PLA-Serve, arXiv 2601.11589, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf
from typing import Annotated

from pla_serve.policy.declare import Kind
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.pools.protocol import Move, Pool, PoolController, PoolReport, other_class


@dataclass(frozen=True, slots=True)
class PressureOptions:
    """The constants of Algorithm 2.

    The publication gives neither values nor units. Backlog and deadline error are seconds here,
    the reading that serves the algorithm best: a hundred short requests are less work than a few
    long ones.

    Raises:
        ValueError: a field is out of range.
    """

    alpha: Annotated[float, Knob("Weight of the backlog q, a second.", least=0)] = 1.0
    beta: Annotated[float, Knob("Weight of the deadline error e, a second.", least=0)] = 1.0
    gamma: Annotated[
        float, Knob("Weight of the utilisation u, 0 to 1; it lowers the pressure.", least=0)
    ] = 1.0
    tolerance: Annotated[
        float,
        Knob("tau: share by which one pool's pressure must exceed the other's.", least=0),
    ] = 0.1
    cooldown_seconds: Annotated[
        float, Knob("T_cool: least time between two migrations.", unit="seconds", least=0)
    ] = 5.0
    min_instances: Annotated[
        int, Knob("n_min: a pool of this size gives none away.", unit="instances", least=1)
    ] = 1

    def __post_init__(self) -> None:
        check_knobs(self)


class PressureController:
    """Algorithm 2: at most one migration at a time, from the pool with less pressure.

    For each instance k, ``psi_k = alpha q_k + beta e_k - gamma u_k``; the pressure of a pool is the
    P90 of its psi. After T_cool, if ``P_s > (1 + tau) P_l`` and ``n_l > n_min``, one long instance
    becomes short; else the mirror image. The one with the least psi goes.

    Two things follow from the formula as published and are left in: because u counts negative,
    pools without a backlog have negative pressures, and for those ``(1 + tau) P`` lies *below* P,
    so that equal pools trade instances, long to short until n_min are left, then to and fro. And
    only one instance moves in T_cool, however large a burst is. `balance.BalanceController` does
    neither.

    A pool without instances (they failed) has infinite pressure. Arrivals are not used.
    """

    def __init__(self, options: PressureOptions | None = None) -> None:
        self._options = options or PressureOptions()
        self._last_move = -inf

    def arrived(self, pool: Pool, seconds: float, now: float) -> None:
        """Not used by this algorithm."""

    def decide(self, now: float, instances: Sequence[PoolReport]) -> Sequence[Move]:
        """Return no move or one."""
        if now - self._last_move < self._options.cooldown_seconds:
            return ()
        if any(report.draining for report in instances):
            return ()
        for target in (Pool.SHORT, Pool.LONG):
            move = self._move(target, instances)
            if move is not None:
                self._last_move = now
                return (move,)
        return ()

    def psi(self, report: PoolReport) -> float:
        """The pressure of one instance."""
        options = self._options
        return (
            options.alpha * report.queued
            + options.beta * report.deadline_error
            - options.gamma * report.utilisation
        )

    def _move(self, target: Pool, instances: Sequence[PoolReport]) -> Move | None:
        source = other_class(target)
        donors = [report for report in instances if report.pool is source]
        if len(donors) <= self._options.min_instances:
            return None
        wanting = self._pressure([report for report in instances if report.pool is target])
        if not wanting > (1 + self._options.tolerance) * self._pressure(donors):
            return None
        goes = min(donors, key=lambda report: (self.psi(report), report.id))
        return Move(goes.id, source, target)

    def _pressure(self, pool: Sequence[PoolReport]) -> float:
        return percentile([self.psi(report) for report in pool], 0.9) if pool else inf


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of ``values`` lie, interpolated between neighbours.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a percentile of no values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[floor(place)], ordered[ceil(place)]
    return low + (high - low) * (place - floor(place))


CONTROLLER: Kind[PoolController] = Kind(
    name="pressure",
    summary="as published, one move at a time by instance pressure",
    make=PressureController,
    options=PressureOptions,
    aliases=("pla-serve",),
)
