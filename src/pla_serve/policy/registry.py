"""The policies by name. A new one is a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Callable

from pla_serve.policy.baselines.fcfs import fcfs
from pla_serve.policy.baselines.hrrn import hrrn
from pla_serve.policy.baselines.srpt import srpt
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.length_aware import LengthAware
from pla_serve.policy.protocol import PrefillPolicy

POLICIES: dict[str, Callable[[PolicyConfig, CostModel], PrefillPolicy]] = {
    "length-aware": LengthAware,
    "fcfs": fcfs,
    "hrrn": hrrn,
    "srpt": srpt,
}


def create_policy(name: str, config: PolicyConfig, cost_model: CostModel) -> PrefillPolicy:
    """A fresh policy of this name.

    Raises:
        ValueError: there is none; the message lists those that there are.
    """
    try:
        make = POLICIES[name]
    except KeyError:
        known = ", ".join(POLICIES)
        raise ValueError(f"unknown policy {name!r}; known are: {known}") from None
    return make(config, cost_model)
