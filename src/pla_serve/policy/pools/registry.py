"""The pool controllers by name. A new one is a file of its own and a line here."""

from __future__ import annotations

from dataclasses import fields
from typing import TypeVar

from pla_serve.policy.knobs import read_knobs
from pla_serve.policy.pools.balance import BalanceController, BalanceOptions
from pla_serve.policy.pools.pressure import PressureController, PressureOptions
from pla_serve.policy.pools.protocol import PoolController

CONTROLLERS = ("balance", "pressure")

ControllerOptions = TypeVar("ControllerOptions", BalanceOptions, PressureOptions)


def parse_controller(text: str) -> PoolController:
    """A fresh controller from ``name:knob=value``, as ``balance:horizon_seconds=5``.

    Raises:
        ValueError: there is no such controller, it has no such knob, or a value does not fit.
    """
    name = text.partition(":")[0]
    if name == "balance":
        return BalanceController(_options(BalanceOptions, text))
    if name == "pressure":
        return PressureController(_options(PressureOptions, text))
    raise ValueError(f"unknown controller {name!r}; known are: {', '.join(CONTROLLERS)}")


def _options(kind: type[ControllerOptions], text: str) -> ControllerOptions:
    defaults = kind()
    values = {}
    for key, value in read_knobs("controller", text, [f.name for f in fields(kind)]).items():
        default = getattr(defaults, key)
        try:
            values[key] = type(default)(value)
        except ValueError:
            noun = "a whole number" if isinstance(default, int) else "a number"
            raise ValueError(f"knob {key} of the controller is {noun}, not {value!r}") from None
    return kind(**values)
