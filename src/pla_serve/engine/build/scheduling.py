"""Stage 7: the policy, the cost model that it predicts with, and the bounds on what waits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pla_serve.engine.config import EngineConfig
from pla_serve.policy.admission import Admission
from pla_serve.policy.cost import CostModel
from pla_serve.policy.harvest import Harvesting
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.registry import create_policy

QUEUED_CAPACITIES = 4
"""Default bound on waiting new tokens, in multiples of the KV capacity."""


@dataclass(frozen=True, slots=True)
class Scheduling:
    """Decides which requests are taken, and in which order they run."""

    policy: PrefillPolicy
    cost: CostModel
    admission: Admission


def build_scheduling(
    config: EngineConfig, cost: CostModel, *, layers: int, kv_tokens: int
) -> Scheduling:
    """Make the policy that the config names, with offline work in the time that it leaves.

    Args:
        layers: decoder layers of the model, unless the policy's config says another number.
        kv_tokens: tokens that the KV cache has room for.

    Raises:
        ValueError: there is no such policy, or its settings are out of range.
    """
    knobs = config.policy_config
    knobs = replace(knobs, layers=knobs.layers or layers)
    queued = config.max_queued_tokens or QUEUED_CAPACITIES * kv_tokens
    return Scheduling(
        policy=Harvesting(create_policy(config.policy, knobs, cost), knobs, cost),
        cost=cost,
        admission=Admission(queued, config.max_predicted_wait),
    )
