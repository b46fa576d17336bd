"""Every scheduling policy by name, and policies made from text.

    policy = create_policy("laps:window_seconds=0.01", PolicyConfig(), CostModel())

A new policy is a file of its own that declares itself, and one line here: docs/write-a-policy.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import PolicyKind, Registry
from pla_serve.policy.knobs import show_value
from pla_serve.policy.protocol import PrefillPolicy

POLICIES: Registry[PolicyKind] = Registry(
    "policy",
    "POLICY",
    (
        "pla_serve.policy.length_aware",
        "pla_serve.policy.baselines.fcfs",
        "pla_serve.policy.baselines.hrrn",
        "pla_serve.policy.baselines.srpt",
        "pla_serve.policy.published.policy",
        "pla_serve.policy.baselines.laps",
        "pla_serve.policy.baselines.bucketserve",
        "pla_serve.policy.baselines.fastserve",
        "pla_serve.policy.baselines.flowprefill",
    ),
)
"""Declarations by name; see `declare`."""


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A known policy with values for some of its knobs; made by `parse_policy`."""

    name: str
    knobs: tuple[tuple[str, Any], ...] = ()
    """Fields of `PolicyConfig` or of the policy's own options, with their values. A knob that is
    not named keeps its default."""

    def __str__(self) -> str:
        """Text that `parse_policy` reads back as an equal spec."""
        return ":".join([self.name, *(f"{name}={show_value(value)}" for name, value in self.knobs)])

    @property
    def kind(self) -> PolicyKind:
        """Declaration of the policy."""
        return POLICIES[self.name]

    def configure(self, config: PolicyConfig) -> PolicyConfig:
        """``config`` with those knobs that are its fields.

        Raises:
            ValueError: a value is out of range.
        """
        settings = self.kind.settings
        return replace(config, **{key: value for key, value in self.knobs if key in settings})

    def create(self, config: PolicyConfig, cost: CostModel) -> PrefillPolicy:
        """A fresh policy; the knobs go before what ``config`` says.

        Raises:
            ValueError: a value is out of range.
        """
        return self.kind.create(self.configure(config), cost, **self._own())

    def check(self) -> None:
        """Make a policy and throw it away.

        Raises:
            ValueError: a value is out of range.
        """
        self.create(PolicyConfig(), CostModel())

    def _own(self) -> dict[str, Any]:
        settings = self.kind.settings
        return {key: value for key, value in self.knobs if key not in settings}


def parse_policy(text: str) -> PolicySpec:
    """Read ``name:knob=value:knob=value``; ``-`` and ``_`` are the same in a knob's name.

    Raises:
        ValueError: there is no such policy, it has no such knob, or a value does not fit; the
            message names it and what there is.
    """
    kind, values = POLICIES.read(text)
    spec = PolicySpec(kind.name, tuple(values.items()))
    spec.check()
    return spec


def create_policy(policy: str, config: PolicyConfig, cost_model: CostModel) -> PrefillPolicy:
    """A fresh policy: ``policy`` is a name, or a name with knobs as `parse_policy` reads it.

    Raises:
        ValueError: there is no such policy or knob, or a value is out of range.
    """
    return parse_policy(policy).create(config, cost_model)
