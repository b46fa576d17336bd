"""Settings of a simulated fleet, and the result of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

from pla_serve.policy.pools.protocol import Move
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.totals import Totals


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Raises:
    ValueError: a field is out of range, or two do not go together.
    """

    instances: int = 1
    """That prefill."""
    short_instances: int = 0
    """So many of them begin in the short pool and the rest in the long one; 0: no such pools."""
    decode: Literal["none", "same", "apart"] = "none"
    """Answers are not simulated beyond their first token; or where the prompt was prefilled; or on
    decode instances, to which the KV is sent (PD spatial)."""
    decode_instances: int = 0
    routing: str = "predicted"
    """As `routing.registry.parse_routing` reads it."""
    express: bool = True
    """The router counts on instances to serve short requests before long ones."""
    boundary_tokens: int = 256
    """L_m of the router."""
    interruptible: bool = True
    """Instances can leave a prefill at a layer boundary."""
    fetch_kv: bool = False
    """A prefill instance may fetch a cached prefix from another one."""
    cache_tokens: int = 0
    """KV of earlier prompts that each prefill instance keeps; 0 keeps none."""
    control_seconds: float = 1.0
    """Between two decisions of a pool controller."""
    recalls: bool = True
    """Requests that wait for a prefill are sent again when an instance joins their pool; otherwise
    they stay where they were sent first."""
    report_seconds: float = 0.2
    """How old the account that an instance itself gives of its queue may be where a request is
    routed; 0: routers go by what they sent alone."""
    start_seconds: float = 0.0
    """From the end of a failure until the instance takes requests."""
    token_seconds: float = 0.0
    """For ``decode="none"``: how long after the first token another token of the answer comes, as
    far as a session's next turn waits for it."""

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
    """What became of it all."""

    jobs: list[SimulatedRequest]
    """By place in the workload."""
    end: float
    """When the last answer was complete."""
    nodes: dict[str, Totals]
    moves: list[tuple[float, Move]] = field(default_factory=list)
    restarts: int = 0
    """Requests that a failure sent elsewhere, each time it did."""
    cached_tokens: int = 0
    """Prompt tokens that were cached where they were needed."""
    fetched_tokens: int = 0
    """Those that another instance sent."""
