"""Declarations of policies, routing policies and pool controllers, and finding them by name.

Each is declared in its own file, below its code, under the name that the registry of its sort
looks for::

    POLICY = PolicyKind(
        name="fcfs",
        summary="first come, first served, as in vLLM",
        make=fcfs,
        settings=CONTINUOUS_SETTINGS,
    )

One line in that registry (`policy.registry`, `routing.registry`, `pools.registry`) names the
module. ``--policy fcfs``, its knobs, its help text and its error messages then follow from the
declaration in every command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Generic, TypeVar

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.knobs import KnobField, knobs_of, read_value, split_knobs
from pla_serve.policy.protocol import PrefillPolicy

Made = TypeVar("Made")

BATCH_SETTINGS = ("max_batch_tokens", "max_batch_requests")
"""Fields of `PolicyConfig` that bound a batch."""
CONTINUOUS_SETTINGS = (*BATCH_SETTINGS, "long_chunk_tokens", "boundary_tokens")
"""Fields that a policy made of `ContinuousBatching` uses; its boundary is for metrics only."""
ALL_SETTINGS = tuple(field.name for field in fields(PolicyConfig))


@dataclass(frozen=True, slots=True)
class Kind(Generic[Made]):
    """Declaration of one named choice."""

    name: str
    """Name on the command line, in lower case with dashes."""
    summary: str
    """Half a sentence for help texts, without a full stop."""
    make: Callable[..., Made]
    """Makes a fresh one; called with an object of ``options`` as its last argument, if there are
    options. A dataclass that holds its own knobs is ``make`` and ``options`` at once; see `itself`.
    """
    options: type | None = None
    """Frozen dataclass whose fields are knobs (`knobs.Knob`), all with defaults."""
    aliases: tuple[str, ...] = ()
    """Other names under which it is found, but not listed."""

    @property
    def knobs(self) -> dict[str, KnobField]:
        """All knobs, by name."""
        return {} if self.options is None else knobs_of(self.options)

    def create(self, *given: Any, **knobs: Any) -> Made:
        """Make a fresh one from what every ``make`` of its sort is given, and its own knobs.

        Raises:
            ValueError: a knob is out of range.
        """
        own = () if self.options is None else (self.options(**knobs),)
        return self.make(*given, *own)


def itself(options: Made) -> Made:
    """Return the options: ``make`` of a dataclass that needs nothing but its own knobs."""
    return options


@dataclass(frozen=True, slots=True)
class PolicyKind(Kind[PrefillPolicy]):
    """Declaration of a scheduling policy; ``make`` gets `PolicyConfig`, `CostModel` and options."""

    settings: tuple[str, ...] = ALL_SETTINGS
    """Fields of `PolicyConfig` that it uses; all others are refused as flags and as knobs."""

    @property
    def knobs(self) -> dict[str, KnobField]:
        """Settings that the policy uses, then its own options."""
        shared = knobs_of(PolicyConfig)
        own = {} if self.options is None else knobs_of(self.options)
        return {name: shared[name] for name in self.settings} | own


AnyKind = TypeVar("AnyKind", bound=Kind[Any])


class Registry(Mapping[str, AnyKind]):
    """Kinds of one sort by name.

    Args:
        noun: what is named, for messages: policy, routing or controller.
        attribute: name under which each module declares its kind, for example ``POLICY``.
        modules: dotted names of the modules, in the order in which help texts list the kinds.

    Raises:
        ValueError: two kinds have the same name.
    """

    def __init__(self, noun: str, attribute: str, modules: Iterable[str]) -> None:
        self.noun = noun
        self._listed: list[str] = []
        self._kinds: dict[str, AnyKind] = {}
        for module in modules:
            kind: AnyKind = getattr(import_module(module), attribute)
            self._listed.append(kind.name)
            for name in (kind.name, *kind.aliases):
                if name in self._kinds:
                    raise ValueError(f"there are two declarations of {noun} {name!r}: rename one")
                self._kinds[name] = kind

    def __getitem__(self, name: str) -> AnyKind:
        return self._kinds[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def help(self) -> str:
        """All names with their summaries, for help texts: ``a (...); b (...)``."""
        return "; ".join(f"{kind.name} ({kind.summary})" for kind in self.values())

    def read(self, text: str) -> tuple[AnyKind, dict[str, Any]]:
        """Read ``name:knob=value:knob=value``; ``-`` and ``_`` are the same in a knob's name.

        Returns:
            The kind, and the values of those knobs that the text names.

        Raises:
            ValueError: there is no such kind, it has no such knob, or a value does not fit; the
                message names it and what there is.
        """
        name, entries = split_knobs(text)
        if name not in self:
            raise ValueError(f"unknown {self.noun} {name!r}; known are: {', '.join(self)}")
        kind = self[name]
        known = kind.knobs
        values: dict[str, Any] = {}
        for (key, value), entry in zip(entries, text.split(":")[1:], strict=True):
            if value is None:
                raise ValueError(f"{entry!r} in {self.noun} {text!r} is not of the form knob=value")
            if key not in known:
                has = f"it has: {', '.join(known)}" if known else "it has none"
                raise ValueError(f"{self.noun} {name} has no knob {key!r}; {has}")
            if key in values:
                raise ValueError(f"knob {key} is given twice in {self.noun} {text!r}")
            values[key] = read_value(f"knob {key} of {self.noun} {name}", value, known[key])
        return kind, values
