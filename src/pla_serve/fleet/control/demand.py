"""Measures the demand on a fleet in instances: the signal for an autoscaler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pla_serve.policy.pools.balance import ClassDemand
from pla_serve.policy.pools.protocol import Pool, PoolReport
from pla_serve.policy.pools.rates import WorkRate
from pla_serve.policy.pools.scaling import Scaler, ScalingOptions

CLASSES = (Pool.SHORT, Pool.LONG)


@dataclass(frozen=True, slots=True)
class Desired:
    """Number of instances that there should be, and the demand it follows from."""

    prefill: int
    """Instances that prefill: short, long and mixed ones together."""
    decode: int
    """0 without a decode pool."""
    demands: dict[Pool, ClassDemand]
    """Demand of the classes SHORT and LONG."""
    held_seconds: float
    """Predicted prefill that the router holds back; counted in ``prefill``."""


class DemandMeter:
    """Arrivals and backlogs of the whole fleet.

    Work counts from the moment a request is dispatched, and its backlog is what instances report,
    waiting or in progress: a signal of busy processors alone would stand still at the number of
    instances while a queue grows. KV memory counts too: instances whose memory is fuller than the
    target utilisation want company.
    """

    def __init__(self, options: ScalingOptions | None = None, memory_seconds: float = 30.0) -> None:
        options = options or ScalingOptions()
        self._rates = {pool: WorkRate(memory_seconds) for pool in CLASSES}
        self._prefill = Scaler(options)
        self._prefill_memory = Scaler(options)
        self._decode = Scaler(options)

    def arrived(self, pool: Pool, seconds: float, now: float) -> None:
        """Count work that arrived, of class SHORT or LONG."""
        self._rates[pool].add(seconds, now)

    def demands(self, instances: Sequence[PoolReport]) -> dict[Pool, ClassDemand]:
        """Return the demand of both classes, with the rates of the last `desired`."""
        short = sum(report.queued_short for report in instances)
        long = sum(report.queued_long for report in instances)
        return {
            Pool.SHORT: ClassDemand(short, self._rates[Pool.SHORT].rate),
            Pool.LONG: ClassDemand(long, self._rates[Pool.LONG].rate),
        }

    def desired(
        self, now: float, instances: Sequence[PoolReport], held_seconds: float = 0.0
    ) -> Desired:
        """End a control period, and return the number of instances that there should be."""
        for rate in self._rates.values():
            rate.close(now)
        demands = self.demands(instances)
        prefills = [report for report in instances if report.pool is not Pool.DECODE]
        decodes = [report for report in instances if report.pool is Pool.DECODE]
        held = [ClassDemand(held_seconds, 0.0)] if held_seconds else []
        by_work = self._prefill.desired(now, [*demands.values(), *held])
        by_memory = self._prefill_memory.desired(now, [_memory(prefills)])
        return Desired(
            prefill=max(by_work, by_memory),
            decode=self._decode.desired(now, [_memory(decodes)]) if decodes else 0,
            demands=demands,
            held_seconds=held_seconds,
        )


def _memory(instances: Sequence[PoolReport]) -> ClassDemand:
    """Return the KV memory in use as a demand, in instances whose memory is full."""
    return ClassDemand(0.0, sum(report.kv_usage for report in instances))
