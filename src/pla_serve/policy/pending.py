"""Rest of a prefill, as the policies keep it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pla_serve.policy.protocol import Chunk


@dataclass(slots=True, eq=False)
class Pending:
    """Rest of one prefill. A `RequestBook` owns it; queues only order it."""

    id: str
    arrival: float
    deadline: float | None
    priority: int
    order: int
    """Number of the `add` that brought the request; breaks ties. New numbers do not change it."""
    new_tokens: int
    history: int
    short: bool
    seconds: float
    """Predicted time for what is left, alone, in full chunks; as of the cost model's epoch."""
    whole: Chunk | None
    """All that is left as one chunk, if the cap allows it, so that decisions need not make one."""
    started: bool = False
    late: bool = False
    """True once the deadline was seen to be out of reach."""
    flight: Chunk | None = None
    """Chunk that was handed out and is not observed or taken back yet; None if there is none."""
    entry: tuple[Any, ...] | None = None
    """Place in the `SortedQueue` in which it waits, or None."""
    tenant: str = ""
    bulk: bool = False
    """Whether nobody waits for it; see `protocol.ServiceLevel`."""
    held: bool = False
    """True while it waits outside the queues for its tenant's share; see `TenantShares`."""
    entered: int = 0
    """When it entered its queue, or was taken from a backlog to be held; see `TenantShares`."""
    charge: float = 0.0
    """Seconds that its tenant was charged for it and that have not run."""
