"""Small fleets with round numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.registry import parse_policy
from pla_serve.simulator.cluster import Cluster
from pla_serve.simulator.cluster_options import ClusterOptions, ClusterResult, SimulatedTraffic
from pla_serve.simulator.machine import KnownCost, Machine, UnitSeconds
from pla_serve.simulator.turns import OpenLoop, SimulatedTurn, TurnSource

MACHINE = Machine(
    name="test",
    source="round numbers",
    layers=8,
    kv_tokens=10_000,
    kv_bytes_per_token=1000.0,
    transfer_bytes_per_second=4e6,
    transfer_seconds=0.01,
    seconds=UnitSeconds(
        per_token=1e-3, per_attention=0.0, per_kv=0.0, per_sequence=0.0, per_launch=0.02
    ),
)
"""A millisecond a token, 20 for a batch; KV moves at a quarter of one a token, after 10."""


def policies(name: str) -> Callable[[], PrefillPolicy]:
    spec, cost = parse_policy(name), KnownCost(MACHINE.profile)
    return lambda: spec.create(PolicyConfig(), cost)


def simulate(
    turns: Sequence[SimulatedTurn],
    policy: str = "fcfs",
    *,
    source: TurnSource | None = None,
    controller: Any = None,
    faults: Any = (),
    deadline: Any = None,
    **options: Any,
) -> ClusterResult:
    cluster = Cluster(
        ClusterOptions(**options),
        MACHINE,
        policies(policy),
        SimulatedTraffic(turns, source or OpenLoop(turns), deadline),
        controller=controller,
        faults=faults,
    )
    return cluster.run()


def plain(*requests: tuple[float, int] | tuple[float, int, int]) -> list[SimulatedTurn]:
    """Time, prompt tokens, output tokens (1) of requests that share nothing."""
    return [
        SimulatedTurn(index, request[0], request[1], request[2] if len(request) > 2 else 1, ())
        for index, request in enumerate(requests)
    ]
