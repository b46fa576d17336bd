"""A fleet as two fluids: work flows into two pools and out as fast as their instances allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from pla_serve.policy.pools.protocol import Move, Pool, PoolController, PoolReport

JOBS_A_SECOND = 64
"""Arrivals of each class; so many that they are next to even."""


@dataclass
class FluidFleet:
    """Instances work on their own class only; a moved one is there at once."""

    controller: PoolController
    short: int
    long: int
    period: float = 1.0
    queued: dict[Pool, float] = field(default_factory=lambda: {Pool.SHORT: 0.0, Pool.LONG: 0.0})
    now: float = 0.0
    sizes: list[int] = field(default_factory=list)
    """Short instances after each decision."""

    def run(self, periods: int, rates: Callable[[float], tuple[float, float]]) -> None:
        """``rates(time)`` gives seconds of work that arrive a second, short and long."""
        steps = round(self.period * JOBS_A_SECOND)
        for _ in range(periods):
            for _ in range(steps):
                self._step(self.period / steps, rates(self.now))
            self._decide()

    def burst(self, pool: Pool, seconds: float, jobs: int = 100) -> None:
        for _ in range(jobs):
            self.controller.arrived(pool, seconds / jobs, self.now)
        self.queued[pool] += seconds

    def _step(self, length: float, rates: tuple[float, float]) -> None:
        for pool, rate, size in zip(self.queued, rates, (self.short, self.long), strict=True):
            if rate:
                self.controller.arrived(pool, rate * length, self.now)
            self.queued[pool] = max(0.0, self.queued[pool] + (rate - size) * length)
        self.now += length

    def _decide(self) -> None:
        moves = self.controller.decide(self.now, self.reports())
        change = sum(1 if move.target is Pool.SHORT else -1 for move in moves)
        assert abs(change) == len(moves), "moves in both directions at once"
        self.short += change
        self.long -= change
        assert self.short >= 1
        assert self.long >= 1
        self.sizes.append(self.short)

    def reports(self) -> list[PoolReport]:
        short, long = self.queued[Pool.SHORT], self.queued[Pool.LONG]
        return [
            PoolReport(f"s{n}", Pool.SHORT, queued_short=short / self.short)
            for n in range(self.short)
        ] + [PoolReport(f"l{n}", Pool.LONG, queued_long=long / self.long) for n in range(self.long)]


def changes(sizes: list[int]) -> int:
    """How often the split changed."""
    return sum(a != b for a, b in pairwise(sizes))


def apply(moves: list[Move], reports: list[PoolReport]) -> dict[str, Pool]:
    """Pools after the moves."""
    pools = {report.id: report.pool for report in reports}
    for move in moves:
        assert pools[move.instance_id] is move.source
        pools[move.instance_id] = move.target
    return pools
