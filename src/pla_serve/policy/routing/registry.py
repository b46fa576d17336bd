"""Every routing policy by name. A new one is a file of its own, and one line here."""

from __future__ import annotations

from pla_serve.policy.declare import Kind, Registry
from pla_serve.policy.routing.protocol import RoutingPolicy

ROUTINGS: Registry[Kind[RoutingPolicy]] = Registry(
    "routing",
    "ROUTING",
    (
        "pla_serve.policy.routing.round_robin",
        "pla_serve.policy.routing.least_loaded",
        "pla_serve.policy.routing.cache_aware",
        "pla_serve.policy.routing.class_pools",
        "pla_serve.policy.routing.predicted",
        "pla_serve.policy.routing.strict_pools",
    ),
)
"""Declarations by name; see `declare`."""


def parse_routing(text: str) -> RoutingPolicy:
    """A fresh policy from ``name:knob=value:knob=value``, as ``cache-aware:balance_abs=32``.

    ``class-pools:inner=NAME`` takes the name of another one.

    Raises:
        ValueError: there is no such policy, it has no such knob, or a value does not fit; the
            message names it and what there is.
    """
    kind, knobs = ROUTINGS.read(text)
    return kind.create(**knobs)
