"""Runs of a comparison: every trace at every load under every policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pla_serve.policy.registry import parse_policy
from pla_serve.simulator.machine import KnownCost
from pla_serve.simulator.setting import RunSpec, Setting
from pla_serve.simulator.workload import TraceWorkload, at_load, sessions_at_load, work_seconds
from pla_serve.traces.load import Trace


@dataclass(frozen=True, slots=True)
class Sweep:
    """Traces, loads and policies to combine.

    Raises:
        ValueError: there is nothing to run, a policy is not known, or a load is not positive.
    """

    traces: tuple[Trace, ...]
    policies: tuple[str, ...]
    loads: tuple[float, ...]
    """Loads; empty in a closed loop, whose load comes from its clients."""
    setting: Setting

    def __post_init__(self) -> None:
        if not self.traces or not self.policies:
            raise ValueError("give at least one --trace and one --policy")
        if bool(self.loads) == (self.setting.clients is not None):
            raise ValueError("give --load, or --clients for a closed loop, and not both")
        for policy in self.policies:
            parse_policy(policy)
        for load in self.loads:
            if not load > 0:
                raise ValueError(f"--load must be positive, not {load:g}")

    def __len__(self) -> int:
        return len(self.traces) * len(self.policies) * max(1, len(self.loads))

    def specs(self) -> Iterator[RunSpec]:
        """Yield all runs by trace, then load, then policy.

        A workload is made when its first run is due.
        """
        for trace in self.traces:
            for load in self.loads or (None,):
                workload = self._lean(self._workload(trace, load))
                for policy in self.policies:
                    yield RunSpec(workload, policy, load, self.setting)

    def _workload(self, trace: Trace, load: float | None) -> TraceWorkload:
        setting = self.setting
        cost = KnownCost(setting.machine.profile)
        batch = setting.decode_batch
        if load is None:
            work = work_seconds(trace.rows, cost, decode_batch=batch)
            return TraceWorkload(trace.name, trace.rows, 1.0, work, f"{setting.clients} clients")
        count = setting.fleet.instances
        if trace.recorded:
            return sessions_at_load(
                trace,
                cost,
                load,
                seed=setting.seed,
                instances=count,
                decode_batch=batch,
                max_pause=setting.max_pause,
            )
        made = at_load(trace.name, trace.rows, cost, load, instances=count, decode_batch=batch)
        return replace(made, clock=f"{trace.clock}, all gaps times {made.stretch:.6g}")

    def _lean(self, workload: TraceWorkload) -> TraceWorkload:
        """Drop blocks where no cache needs them, so that less is sent to workers."""
        if self.setting.kv_tokens is not None:
            return workload
        return replace(workload, rows=tuple(replace(row, blocks=None) for row in workload.rows))
