"""Divides instances between prefill and decode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from pla_serve.policy.pools.balance import ClassDemand
from pla_serve.policy.pools.protocol import Move, Pool, PoolReport


@dataclass(frozen=True, slots=True)
class StageOptions:
    """Raises:
    ValueError: a field is out of range.
    """

    full: float = 0.9
    """Share of the decode instances' KV memory above which they want another instance."""
    spare: float = 0.6
    """Share below which the others must stay if one is to be given away."""
    horizon_seconds: float = 10.0
    """Seconds in which a backlog should be cleared, as `BalanceOptions.horizon_seconds`."""
    min_prefill: int = 1
    """Instances that each class of prompts keeps."""
    min_decode: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.spare < self.full <= 1:
            raise ValueError(
                f"0 < spare < full <= 1 must hold, not spare {self.spare}, full {self.full}"
            )
        if not (isfinite(self.horizon_seconds) and self.horizon_seconds > 0):
            raise ValueError(f"horizon_seconds must be positive, not {self.horizon_seconds}")
        for name in ("min_prefill", "min_decode"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class StageController:
    """Moves one instance at a time between prefill and decode; the classes are another's.

    What a decode instance runs out of is KV memory, so its load is the share of it in use.

    - Prefill to decode: the decode pool is more than ``full``, and the prefill instances that are
      left keep up with their arrivals and clear their backlog in time, ``d <= n - 1``.
    - Decode to prefill: prefill cannot, ``d > n``, and the load of the decode instances, on one
      fewer, stays below ``spare``.

    Neither undoes the other while demands stay as they are: after the first, d <= n; after the
    second, the load is below ``spare``, and so below ``full``. A pool that lost its instances to
    failures gets one back at once. While one that was moved still drains, nothing else moves.
    """

    def __init__(self, options: StageOptions | None = None) -> None:
        self._options = options or StageOptions()

    def decide(
        self, instances: Sequence[PoolReport], demands: dict[Pool, ClassDemand]
    ) -> Sequence[Move]:
        """Return no move or one.

        Args:
            demands: of the classes SHORT and LONG.
        """
        if any(report.draining for report in instances):
            return ()
        decoders = [report for report in instances if report.pool is Pool.DECODE]
        wanted = sum(d.instances(self._options.horizon_seconds) for d in demands.values())
        pools = {pool: [r for r in instances if r.pool is pool] for pool in demands}
        prefills = sum(map(len, pools.values()))
        load = sum(report.kv_usage for report in decoders)
        if not decoders or (load > self._options.full * len(decoders) and wanted <= prefills - 1):
            return self._to_decode(pools, demands)
        empty = any(not members for members in pools.values()) and prefills < len(pools)
        if empty or wanted > prefills:
            return self._to_prefill(decoders, load, pools, demands)
        return ()

    def _to_decode(
        self, pools: dict[Pool, list[PoolReport]], demands: dict[Pool, ClassDemand]
    ) -> Sequence[Move]:
        """Return the move of the instance that drains first, of the least loaded class."""
        horizon, least = self._options.horizon_seconds, self._options.min_prefill
        donors = [pool for pool, members in pools.items() if len(members) > least]
        if not donors:
            return ()
        source = min(donors, key=lambda p: demands[p].instances(horizon) / (len(pools[p]) - 1))
        goes = min(pools[source], key=lambda report: (report.drain_seconds, report.id))
        return (Move(goes.id, source, Pool.DECODE),)

    def _to_prefill(
        self,
        decoders: Sequence[PoolReport],
        load: float,
        pools: dict[Pool, list[PoolReport]],
        demands: dict[Pool, ClassDemand],
    ) -> Sequence[Move]:
        """Return the move of the decode instance with the least KV to the most loaded class."""
        left = len(decoders) - 1
        if left < self._options.min_decode or load >= self._options.spare * left:
            return ()
        horizon = self._options.horizon_seconds

        def pressed(pool: Pool) -> float:
            size = len(pools[pool])
            return demands[pool].instances(horizon) / size if size else float("inf")

        goes = min(decoders, key=lambda report: (report.kv_usage, report.id))
        return (Move(goes.id, Pool.DECODE, max(pools, key=pressed)),)
