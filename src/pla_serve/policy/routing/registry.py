"""The routing policies by name. A new one is a file of its own and a line here."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from pla_serve.policy.knobs import read_knobs
from pla_serve.policy.routing.cache_aware import CacheAware
from pla_serve.policy.routing.class_pools import ClassPools
from pla_serve.policy.routing.least_loaded import LeastLoaded
from pla_serve.policy.routing.predicted import Predicted
from pla_serve.policy.routing.protocol import RoutingPolicy
from pla_serve.policy.routing.round_robin import RoundRobin

ROUTINGS: dict[str, type[Any]] = {
    "round-robin": RoundRobin,
    "least-loaded": LeastLoaded,
    "cache-aware": CacheAware,
    "class-pools": ClassPools,
    "predicted": Predicted,
}
"""Each makes a `RoutingPolicy`; the fields of a dataclass are its knobs."""


def parse_routing(text: str) -> RoutingPolicy:
    """A fresh policy from ``name:knob=value:knob=value``, as ``cache-aware:balance_abs=32``.

    ``class-pools:inner=NAME`` takes the name of another one.

    Raises:
        ValueError: there is no such policy, it has no such knob, or a value does not fit; the
            message names it and what there is.
    """
    name = text.partition(":")[0]
    if name not in ROUTINGS:
        raise ValueError(f"unknown routing {name!r}; known are: {', '.join(ROUTINGS)}")
    defaults = _knobs(name)
    knobs = {
        key: _convert(f"knob {key} of routing {name}", value, defaults[key])
        for key, value in read_knobs("routing", text, defaults).items()
    }
    policy: RoutingPolicy = ROUTINGS[name](**knobs)
    return policy


def _knobs(name: str) -> dict[str, Any]:
    """Knobs and their defaults."""
    kind = ROUTINGS[name]
    if not is_dataclass(kind):
        return {}
    default = kind()
    return {field.name: getattr(default, field.name) for field in fields(kind)}


def _convert(what: str, text: str, default: Any) -> Any:
    if isinstance(default, (str, int, float)):
        try:
            return type(default)(text)
        except ValueError:
            noun = "a whole number" if isinstance(default, int) else "a number"
            raise ValueError(f"{what} is {noun}, not {text!r}") from None
    if text == "class-pools":
        raise ValueError(f"{what} is another routing, not {text!r} itself")
    return parse_routing(text)
