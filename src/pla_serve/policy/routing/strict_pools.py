"""Spatial disaggregation as published: pools that nothing crosses (PLA-Serve, arXiv 2601.11589).

The publication says that an instance serves one class, and not how requests are spread within a
pool; here each goes to the instance with the fewest requests. `pressure.PressureController` moves
instances between the pools.
"""

from __future__ import annotations

from math import inf

from pla_serve.policy.declare import Kind
from pla_serve.policy.routing.class_pools import ClassPools
from pla_serve.policy.routing.least_loaded import LeastLoaded
from pla_serve.policy.routing.protocol import RoutingPolicy


def strict_pools() -> ClassPools:
    """`ClassPools` without an overflow, least loaded within a pool."""
    return ClassPools(inner=LeastLoaded(), overflow_seconds=inf)


ROUTING: Kind[RoutingPolicy] = Kind(
    name="pla-serve", summary="as published, pools that nothing crosses", make=strict_pools
)
