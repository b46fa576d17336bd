"""One instance of a simulated fleet: the device, its cache, and what becomes of both."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from pla_serve.policy.pools.protocol import Pool
from pla_serve.simulator.caches import SimulatedPrefixCache
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.request import SimulatedRequest


@dataclass(slots=True)
class Totals:
    """Of all lives of an instance."""

    busy_seconds: float = 0.0
    computed_tokens: int = 0
    batches: int = 0
    express_batches: int = 0
    failures: int = 0

    def add(self, instance: SimulatedInstance) -> None:
        """Count a life that is over."""
        self.busy_seconds += instance.busy_seconds
        self.computed_tokens += instance.computed_tokens
        self.batches += instance.batches
        self.express_batches += instance.express_batches


@dataclass(slots=True, eq=False)
class Node:
    """A place in the fleet; after a failure another `SimulatedInstance` takes it."""

    id: str
    pool: Pool
    instance: SimulatedInstance
    cache: SimulatedPrefixCache
    alive: bool = True
    life: int = 0
    """Grows with each failure: what was on its way to an earlier life is lost."""
    scheduled: float = inf
    """Time of the earliest event that wakes it."""
    moved_at: float = -inf
    """When it last changed its pool."""
    transfers: dict[str, SimulatedRequest] = field(default_factory=dict)
    """Whose KV is on its way to it (fetched), or from it (to be decoded elsewhere)."""
    totals: Totals = field(default_factory=Totals)
    busy_before: float = 0.0
    """Busy seconds of this life at the last control period's end."""
    lateness: float = 0.0
    """Seconds by which first tokens of this control period missed their deadlines, summed."""
    first_tokens: int = 0
    """How many those were."""
