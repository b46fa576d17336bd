"""Makes policies from text; `catalogue` lists them."""

from __future__ import annotations

from pla_serve.policy.catalogue import POLICIES
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import PrefillPolicy
from pla_serve.policy.spec import parse_policy

__all__ = ["POLICIES", "create_policy"]


def create_policy(policy: str, config: PolicyConfig, cost_model: CostModel) -> PrefillPolicy:
    """A fresh policy: ``policy`` is a name, or a name with knobs as `spec.parse_policy` reads it.

    Raises:
        ValueError: there is no such policy or knob, or a value is out of range.
    """
    return parse_policy(policy).create(config, cost_model)
