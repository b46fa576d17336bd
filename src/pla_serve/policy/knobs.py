"""Knobs: the documented, bounded fields of a settings dataclass, and their form as text.

A field declares its help text, unit and bounds once, where it stands::

    @dataclass(frozen=True, slots=True)
    class SrptOptions:
        aging: Annotated[float, Knob("Remaining work that a second of waiting outweighs.",
                                     unit="seconds", least=0)] = 1.0

        def __post_init__(self) -> None:
            check_knobs(self)

Command lines, error messages and documentation read them from there with `knobs_of`. As text, a
name with knobs is ``srpt:aging=0.5:max-batch-tokens=512``; `split_knobs` and `read_value` are the
only code that reads this form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True)
class Knob:
    """Documentation and bounds of one field; goes into its ``Annotated`` type.

    A value of None passes all bounds: a field that may be None says what None means.
    """

    help: str
    """One or two sentences for a user: what the value is, and what more of it does."""
    unit: str = ""
    """Unit of the value, for example ``seconds`` or ``tokens``; empty for a plain number."""
    least: float | None = None
    """Smallest allowed value."""
    above: float | None = None
    """Value that must be exceeded."""
    most: float | None = None
    """Largest allowed value."""
    below: float | None = None
    """Value that must not be reached."""
    finite: bool = True
    """Whether a float must be finite."""
    read: Callable[[str], Any] | None = None
    """Reads the value from text, for types other than int, float, bool and Literal."""

    def range(self, kind: Any) -> str:
        """Allowed values in words, to follow "must": "be at least 1", "lie between 0 and 1"."""
        if self.above is not None and self.below is not None:
            return f"lie between {self.above:g} and {self.below:g}"
        if self.least is not None and self.most is not None:
            return f"lie in {self.least:g}..{self.most:g}"
        parts = []
        if self.above is not None:
            parts.append("positive" if self.above == 0 else f"above {self.above:g}")
        bounded = self.most is not None or self.below is not None
        if self.finite and not bounded and float in (kind, *get_args(kind)):
            parts.append("finite")
        if self.least is not None:
            parts.append(f"at least {self.least:g}")
        if self.below is not None:
            parts.append(f"below {self.below:g}")
        if self.most is not None:
            parts.append(f"at most {self.most:g}")
        return "be " + " and ".join(parts)

    def allows(self, value: float) -> bool:
        """Whether ``value`` lies within the bounds; NaN never does."""
        return not (
            value != value
            or (self.finite and not isfinite(value))
            or (self.least is not None and value < self.least)
            or (self.above is not None and value <= self.above)
            or (self.most is not None and value > self.most)
            or (self.below is not None and value >= self.below)
        )


@dataclass(frozen=True, slots=True)
class KnobField:
    """One knob of a settings dataclass, with all that a command line needs to offer it."""

    name: str
    """Name of the field; as a flag it is ``--`` and the name with dashes."""
    type: Any
    """Type of the value without its ``Annotated`` wrapper, for example ``int | None``."""
    default: Any
    knob: Knob


@cache
def knobs_of(options: type) -> dict[str, KnobField]:
    """Knobs of a dataclass whose fields all have defaults, in their order.

    A field without a `Knob` has no help text and no bounds.
    """
    hints = get_type_hints(options, include_extras=True)
    found = {}
    for field in fields(options):
        hint = hints[field.name]
        extras = getattr(hint, "__metadata__", ())
        knob = next((extra for extra in extras if isinstance(extra, Knob)), Knob(""))
        kind = get_args(hint)[0] if extras else hint
        factory = field.default_factory
        default = field.default if factory is MISSING else factory()
        found[field.name] = KnobField(field.name, kind, default, knob)
    return found


def check_knobs(options: Any) -> None:
    """Check every field of a settings dataclass against its `Knob`; for ``__post_init__``.

    Raises:
        ValueError: a value is out of range or is none of its choices; the message names the field
            and what is allowed.
    """
    kind: type = type(options)
    for name, field in knobs_of(kind).items():
        value = getattr(options, name)
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        if choices and value not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(str, choices))}, not {value!r}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not field.knob.allows(value):
            raise ValueError(f"{name} must {field.knob.range(field.type)}, not {value}")


def split_knobs(text: str) -> tuple[str, list[tuple[str, str | None]]]:
    """Split ``name:knob=value:flag`` into the name and its knobs.

    A knob's name comes with underscores in place of dashes; the value is None where there is no
    ``=``.

    >>> split_knobs("fcfs:max-batch-tokens=512:no-graphs")
    ('fcfs', [('max_batch_tokens', '512'), ('no_graphs', None)])
    """
    name, *entries = text.split(":")
    knobs: list[tuple[str, str | None]] = []
    for entry in entries:
        key, equals, value = entry.partition("=")
        knobs.append((key.strip().replace("-", "_"), value.strip() if equals else None))
    return name, knobs


def read_value(what: str, text: str, field: KnobField) -> Any:
    """Convert the text of a knob's value to the type of its field.

    Args:
        what: how messages name the knob, for example "knob aging of policy srpt".

    Raises:
        ValueError: the text is no such value.
    """
    kind = field.type
    if field.knob.read is not None:
        return field.knob.read(text)
    if get_origin(kind) in (Union, UnionType):
        if text.lower() == "none" and NoneType in get_args(kind):
            return None
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    if get_origin(kind) is Literal:
        return text  # `check_knobs` knows the choices
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{what} is true or false, not {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        noun = {int: "a whole number", float: "a number"}.get(kind, f"a {kind.__name__}")
        raise ValueError(f"{what} is {noun}, not {text!r}") from None


def show_value(value: Any) -> str:
    """Text of a value that `read_value` reads back."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
