"""A request whose prefill is not finished, as the policies keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pla_serve.policy.protocol import Chunk


@dataclass(slots=True, eq=False)
class Pending:
    """What is left of one prefill. Owned by a `RequestBook`; queues only order these."""

    id: str
    arrival: float
    deadline: float | None
    priority: int
    order: int
    """Counts the adds; breaks ties, and is kept when the numbers of a request change."""
    new_tokens: int
    history: int
    short: bool
    seconds: float
    """Predicted time for what is left, alone, in full chunks; as of the cost model's epoch."""
    whole: Chunk | None
    """All that is left as one chunk, where the cap allows; made once, taken by a decision."""
    started: bool = False
    late: bool = False
    """Its deadline was seen to be out of reach."""
    flight: Chunk | None = None
    """The chunk that was handed out and has not come back."""
    entry: tuple[Any, ...] | None = None
    """Its place in a `SortedQueue`."""
    tenant: str = ""
    held: bool = False
    """It waits outside the policy's queues for its tenant's share; see `TenantShares`."""
    charge: float = 0.0
    """Of what its tenant was charged for it, the seconds that have not run."""
