"""Small moves that the tests of baselines share."""

from __future__ import annotations

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch, PrefillPolicy, PrefillRequest, Run
from pla_serve.policy.registry import create_policy

MILLISECOND_A_TOKEN = CostProfile(1e-3, 0, 0, 0, 0)


def make(
    policy: str, config: PolicyConfig, profile: CostProfile = MILLISECOND_A_TOKEN
) -> PrefillPolicy:
    """A policy whose cost model never learns."""
    cost = CostModel(profile)
    cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]
    return create_policy(policy, config, cost)


def add(
    policy: PrefillPolicy,
    request_id: str,
    tokens: int,
    now: float = 0.0,
    *,
    history: int = 0,
    deadline: float | None = None,
    priority: int = 0,
) -> None:
    """A request arrives."""
    policy.add(PrefillRequest(request_id, now, tokens, history, deadline, priority), now)


def run(policy: PrefillPolicy, now: float = 1.0) -> Batch:
    """The batch that is next."""
    decision = policy.next(now)
    assert isinstance(decision, Run)
    return decision.batch


def step(policy: PrefillPolicy, now: float, seconds: float = 0.0) -> list[tuple[str, int]]:
    """Run the next batch; what it prefilled. It takes ``seconds`` and ends at ``now``."""
    batch = run(policy, now - seconds)
    policy.observe(batch, seconds, now)
    return shape(batch)


def shape(batch: Batch) -> list[tuple[str, int]]:
    """Ids and tokens of its prefills."""
    return [(chunk.request_id, chunk.tokens) for chunk in batch.prefills]
