"""How many replicas there should be: the fleet's signal as Ray's autoscaling policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from pla_serve.policy.pools.balance import ClassDemand
from pla_serve.policy.pools.scaling import Scaler, ScalingOptions


class DesiredReplicas:
    """Ray's autoscaling policy, called by its controller with the state of a deployment.

    Counts what arrives and what waits, in seconds of prefill, and KV in use, as
    ``pla_serve_fleet:desired_instances`` does: it rises at once, and falls after five calm minutes.
    Replicas of Ray that report nothing of this keep their number.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, **options: float) -> None:
        """
        Args:
            options: fields of `ScalingOptions`.

        Raises:
            ValueError: a field is out of range.
        """
        self._clock = clock
        self._work = Scaler(ScalingOptions(**options))  # type: ignore[arg-type]
        self._memory = Scaler(ScalingOptions(**options))  # type: ignore[arg-type]

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas for an ``AutoscalingContext``, and no state of Ray's."""
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        if not metrics.get("short_rate"):
            return context.target_num_replicas, {}
        now = self._clock()
        work = [
            ClassDemand(_sum(metrics, f"{kind}_backlog"), _sum(metrics, f"{kind}_rate"))
            for kind in ("short", "long")
        ]
        by_work = self._work.desired(now, work)
        memory = ClassDemand(0.0, _sum(metrics, "kv_usage"))
        wanted = max(by_work, self._memory.desired(now, [memory]))
        least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(max(wanted, least), most), {}


def _sum(metrics: Mapping[str, Mapping[Any, float]], name: str) -> float:
    return sum(metrics.get(name, {}).values())
