"""Every pool controller by name. A new one is a file of its own, and one line here."""

from __future__ import annotations

from pla_serve.policy.declare import Kind, Registry
from pla_serve.policy.pools.protocol import PoolController

CONTROLLERS: Registry[Kind[PoolController]] = Registry(
    "controller",
    "CONTROLLER",
    ("pla_serve.policy.pools.balance", "pla_serve.policy.pools.pressure"),
)
"""Declarations by name; see `declare`."""


def parse_controller(text: str) -> PoolController:
    """A fresh controller from ``name:knob=value``, for example ``balance:horizon_seconds=5``.

    Raises:
        ValueError: there is no such controller, it has no such knob, or a value does not fit.
    """
    kind, knobs = CONTROLLERS.read(text)
    return kind.create(**knobs)
