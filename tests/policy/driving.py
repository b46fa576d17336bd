"""Short words for driving length-aware by hand."""

from __future__ import annotations

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.length_aware import LengthAware
from pla_serve.policy.protocol import Batch, PrefillRequest, Run

PROFILE = CostProfile(1e-3, 0, 0, 0, 1e-2)
"""A millisecond a token and ten a batch: easy to reckon with."""
CONFIG = PolicyConfig(boundary_tokens=256, itl_slo_ms=44)
"""Four decode steps of one stream from token to token."""


def make(config: PolicyConfig = CONFIG) -> LengthAware:
    cost = CostModel(PROFILE)
    cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]
    return LengthAware(config, cost)


def add(policy: LengthAware, name: str, tokens: int, now: float = 0.0, **rest: object) -> None:
    policy.add(PrefillRequest(name, now, tokens, **rest), now)  # type: ignore[arg-type]


def run(policy: LengthAware, now: float) -> Batch:
    decision = policy.next(now)
    assert isinstance(decision, Run)
    return decision.batch


def spread(policy: LengthAware) -> None:
    """Have it see traffic in which times of longs differ widely."""
    for n in range(100):
        add(policy, f"seen{n}", 20_000 if n % 20 == 0 else 300)
        policy.remove(f"seen{n}")
        add(policy, f"seen{n}", 20)
        policy.remove(f"seen{n}")


def ran(policy: LengthAware) -> float:
    """Seconds of the long that runs."""
    assert policy._flights.top is not None
    return policy._flights.top.ran


def names(batch: Batch | None) -> list[str]:
    assert batch is not None
    return [chunk.request_id for chunk in batch.prefills]
