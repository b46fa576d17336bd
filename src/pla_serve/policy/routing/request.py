"""Input of a routing policy: a request, and the fleet, as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple


class NoInstance(LookupError):
    """No instance can take the request now; the message says why."""


class RouteRequest(NamedTuple):
    """A request to place. (A tuple, because a fleet makes thousands of these a second.)"""

    id: str
    prompt_tokens: int
    """At least 1."""
    cached: Mapping[str, int] = {}
    """Prompt tokens whose KV an instance holds, by instance; those that hold none may be left out.
    A decision takes time in proportion to its length."""
    common: int = 0
    """Prompt tokens whose KV every instance holds, as of a system prompt."""
    deadline: float | None = None
    """When the first token is due, on the router's clock; None: as soon as may be."""
    bulk: bool = False
    """Whether nobody waits for it: it counts as long, whatever its size."""


@dataclass(frozen=True, slots=True)
class FleetModel:
    """Facts that hold for all instances of a router.

    Raises:
        ValueError: ``boundary_tokens`` or ``launch_seconds`` is negative.
    """

    prefill_seconds: Callable[[int, int], float]
    """Predicted time of a prefill alone by new tokens and history, as
    `CostModel.prefill_seconds`."""
    boundary_tokens: int = 256
    """L_m: at most so many new tokens are short."""
    express: bool = True
    """Short requests do not wait for long ones on the same instance (policy length-aware)."""
    transfer_seconds: Callable[[int], float] | None = None
    """Time to fetch the KV of so many tokens from another instance; None if that is impossible."""
    launch_seconds: float = 0.0
    """The part of ``prefill_seconds`` that short requests of one batch share: it is charged to the
    first of a queue only."""

    def __post_init__(self) -> None:
        if not self.launch_seconds >= 0:
            raise ValueError(f"launch_seconds must be at least 0, not {self.launch_seconds}")
        if self.boundary_tokens < 0:
            raise ValueError(f"boundary_tokens must be at least 0, not {self.boundary_tokens}")

    @property
    def grace_seconds(self) -> float:
        """Seconds that an express queue may be late and still count as about to be empty: the time
        of the longest short prompt. Shorts that find each other share a launch; sent apart for a
        delay of milliseconds, they take that much more from the longs."""
        return self.prefill_seconds(max(1, self.boundary_tokens), 0)
