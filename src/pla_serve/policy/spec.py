"""A policy and its knobs as a line of text: ``fcfs:max_batch_tokens=512:boundary_tokens=256``."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pla_serve.policy.catalogue import POLICIES, PolicyKind
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.knobs import read_knobs
from pla_serve.policy.protocol import PrefillPolicy

Value = int | float | str | bool | None


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A known policy with values for some of its knobs; made by `parse_policy`."""

    name: str
    knobs: tuple[tuple[str, Value], ...] = ()
    """Fields of `PolicyConfig` or of the policy's own options; what is not named keeps its
    default."""

    def __str__(self) -> str:
        """Text that `parse_policy` reads back as an equal spec."""
        return ":".join([self.name, *(f"{name}={_show(value)}" for name, value in self.knobs)])

    @property
    def kind(self) -> PolicyKind:
        """What is known of the policy."""
        return POLICIES[self.name]

    def configure(self, config: PolicyConfig) -> PolicyConfig:
        """``config`` with those knobs that are its fields.

        Raises:
            ValueError: a value is out of range.
        """
        settings = self.kind.settings
        return replace(config, **{k: v for k, v in self.knobs if k in settings})  # type: ignore[arg-type]

    def create(self, config: PolicyConfig, cost: CostModel) -> PrefillPolicy:
        """A fresh policy; the knobs go before what ``config`` says.

        Raises:
            ValueError: a value is out of range.
        """
        kind, config = self.kind, self.configure(config)
        if kind.options is None:
            return kind.make(config, cost)
        return kind.make(config, cost, self._options())

    def check(self) -> None:
        """Raises:
        ValueError: a value is out of range.
        """
        self.configure(PolicyConfig())
        self._options()

    def _options(self) -> Any:
        kind = self.kind
        if kind.options is None:
            return None
        return kind.options(**{k: v for k, v in self.knobs if k not in kind.settings})


def parse_policy(text: str) -> PolicySpec:
    """Read ``name:knob=value:knob=value``; ``-`` and ``_`` are the same in a knob's name.

    Raises:
        ValueError: there is no such policy, it has no such knob, or a value does not fit; the
            message names it and what there is.
    """
    name = text.partition(":")[0]
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known are: {', '.join(POLICIES)}")
    types = knob_types(name)
    knobs = {
        key: _convert(f"knob {key} of policy {name}", value, types[key])
        for key, value in read_knobs("policy", text, types).items()
    }
    spec = PolicySpec(name, tuple(knobs.items()))
    spec.check()
    return spec


def knob_types(name: str) -> dict[str, Any]:
    """The knobs of a known policy and their types, settings first."""
    kind = POLICIES[name]
    hints = get_type_hints(PolicyConfig)
    types = {field: hints[field] for field in kind.settings}
    if kind.options is not None:
        own = get_type_hints(kind.options)
        types |= {field.name: own[field.name] for field in fields(kind.options)}
    return types


def _convert(what: str, text: str, kind: Any) -> Value:
    if get_origin(kind) in (Union, UnionType):
        if text.lower() == "none" and NoneType in get_args(kind):
            return None
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"{what} is one of {', '.join(get_args(kind))}, not {text!r}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{what} is true or false, not {text!r}")
        return text.lower() == "true"
    try:
        value: Value = kind(text)
    except ValueError:
        noun = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{what} is {noun}, not {text!r}") from None
    return value


def _show(value: Value) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
