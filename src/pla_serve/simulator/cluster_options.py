"""Settings of a simulated fleet, and the result of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from pla_serve.policy.pools.protocol import Move
from pla_serve.policy.tiers import Tier
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.totals import Totals
from pla_serve.simulator.turns import SimulatedTurn, TurnSource


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Settings of a simulated fleet.

    Raises:
        ValueError: a field is out of range, or two do not go together.
    """

    instances: int = 1
    """Number of instances that prefill."""
    short_instances: int = 0
    """Number of them that begin in the short pool, the others in the long one; 0: no pools."""
    decode: Literal["none", "same", "apart"] = "none"
    """Where answers decode. none: they end with their first token; same: where the prompt was
    prefilled; apart: on decode instances, to which the KV is sent (PD spatial)."""
    decode_instances: int = 0
    routing: str = "predicted"
    """Routing policy, as `routing.registry.parse_routing` reads it."""
    express: bool = True
    """Whether the router assumes that instances serve short requests before long ones."""
    boundary_tokens: int = 256
    """Most new tokens of a short request (L_m) for the router."""
    interruptible: bool = True
    """Whether instances can leave a prefill at a layer boundary."""
    fetch_kv: bool = False
    """Whether a prefill instance may fetch a cached prefix from another one."""
    cache_tokens: int = 0
    """Tokens of earlier prompts whose KV each prefill instance keeps."""
    control_seconds: float = 1.0
    """Seconds between two decisions of a pool controller."""
    recalls: bool = True
    """Whether waiting requests are routed again when an instance joins their pool; otherwise they
    remain on the instance to which they were sent first."""
    report_seconds: float = 0.2
    """Seconds between two reports of an instance; 0: the router knows only what it sent itself."""
    start_seconds: float = 0.0
    """Seconds from the end of a failure until the instance takes requests."""
    token_seconds: float = 0.0
    """Seconds between two tokens of an answer with ``decode="none"``, for turns that wait."""

    def __post_init__(self) -> None:
        if self.instances < 1:
            raise ValueError(f"instances must be at least 1, not {self.instances}")
        if not 0 <= self.short_instances <= self.instances:
            raise ValueError(
                f"short_instances must lie in 0..{self.instances}, not {self.short_instances}"
            )
        if self.decode not in ("none", "same", "apart"):
            raise ValueError(f"decode must be none, same or apart, not {self.decode!r}")
        if (self.decode == "apart") != (self.decode_instances > 0):
            raise ValueError("decode='apart' and decode_instances of at least 1 go together")
        if self.token_seconds and self.decode != "none":
            raise ValueError("token_seconds is for decode='none'; otherwise tokens are simulated")
        for name in ("cache_tokens", "report_seconds", "start_seconds", "token_seconds"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0, not {value}")


@dataclass(slots=True)
class ClusterResult:
    """Result of a run."""

    jobs: list[SimulatedRequest]
    """Requests with their times, by their place in the workload."""
    end: float
    """Time at which the last answer was complete."""
    nodes: dict[str, Totals]
    moves: list[tuple[float, Move]] = field(default_factory=list)
    restarts: int = 0
    """Number of times that a request was sent to another instance after a failure."""
    cached_tokens: int = 0
    """Prompt tokens that were cached on the instance that needed them."""
    fetched_tokens: int = 0
    """Prompt tokens that were fetched from another instance."""


@dataclass(frozen=True, slots=True)
class SimulatedTraffic:
    """Requests of one run.

    Attributes:
        turns: all requests, by row.
        source: says when they arrive.
        deadline: seconds after arrival until a first token is due, or None; None for none at all.
        tiers: that of each row, whose targets go before ``deadline``; empty for none. With tiers,
            instances refuse requests whose promised targets they predict not to keep.
    """

    turns: Sequence[SimulatedTurn]
    source: TurnSource
    deadline: Callable[[SimulatedTurn], float | None] | None = None
    tiers: Sequence[Tier] = ()


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Measures routing decisions: ``clock`` in seconds, and ``report`` called with each time."""

    clock: Callable[[], float]
    report: Callable[[float], None]
