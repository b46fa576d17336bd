"""Flags: fields of config dataclasses that the command line can set.

A flag is written once, at its field: the help text, panel, bounds and unit, and its names where
they differ from the field's::

    @dataclass(frozen=True, slots=True)
    class EngineConfig:
        block_tokens: Annotated[
            int,
            Flag("Tokens in one KV block.", unit="tokens", least=1, panel="KV cache",
                 name="--block-size"),
        ] = 16

        def __post_init__(self) -> None:
            check_knobs(self)

A command lists the dataclasses whose flags it takes (`command_line.CliCommand`). Nothing here reads
a command line, so that the engine can import it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from pla_serve.policy.knobs import Knob, KnobField, knobs_of


@dataclass(frozen=True, slots=True)
class Flag(Knob):
    """Documentation and bounds of a field, and how it appears on the command line.

    ``read`` takes the text behind the flag; a ValueError of it is a usage error.
    """

    panel: str = ""
    """Title of the flags that the help shows together; "" is the first, untitled one."""
    name: str = ""
    """Name of the flag; "" is ``--`` and the name of the field, with dashes."""
    also: tuple[str, ...] = ()
    """Further names, for example ``-o``."""
    metavar: str = ""
    """Word that stands for the value in the help; "" names the type."""
    variable: str = ""
    """Environment variable that gives the value where the command line does not."""
    argument: bool = False
    """Whether it is given by its place and not by a name; a tuple takes all that are left."""
    switch: bool = False
    """Whether a bool can be turned on only: it has no ``--no-`` form."""
    hidden: bool = False
    """Whether the help leaves it out."""
    none: float | None = None
    """Number that stands for None on the command line, for example 0 for "no bound"."""
    show: Callable[[Any], str] = str
    """Text of the default in the help."""
    more: Callable[[], str] | None = None
    """Further help that takes time to make; it is called only where the help is shown."""


@dataclass(frozen=True, slots=True)
class CommandFlag:
    """One flag of a command: a field of a config dataclass with its `Flag`."""

    config: type
    field: str
    type: Any
    """Type of the value, for example ``int | None``."""
    default: Any
    """Default of the field; ``dataclasses.MISSING`` if it has none."""
    flag: Flag

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the one that the help shows first in front; empty for an argument."""
        if self.flag.argument:
            return ()
        return (self.flag.name or "--" + self.field.replace("_", "-"), *self.flag.also)

    @property
    def record_name(self) -> str:
        """Name in records: that of the flag as an identifier."""
        return self.names[0].lstrip("-").replace("-", "_") if self.names else self.field

    @property
    def off_name(self) -> str | None:
        """Name that turns a bool off, or None if there is none."""
        if self.type is not bool or self.flag.switch:
            return None
        return "--no-" + self.names[0].removeprefix("--")

    @property
    def value_type(self) -> Any:
        """Type of the value without ``| None``."""
        if get_origin(self.type) in (Union, UnionType):
            (kind,) = (part for part in get_args(self.type) if part is not NoneType)
            return kind
        return self.type

    @property
    def repeats(self) -> bool:
        """Whether several values may be given."""
        return get_origin(self.value_type) is tuple and self.flag.read is None

    @property
    def required(self) -> bool:
        """Whether the command cannot do without it."""
        return self.default is MISSING

    @property
    def default_text(self) -> str:
        """Text of the default for the help; "" if there is none to show."""
        value = self.default
        if value is None and self.flag.none is not None:
            return f"{self.flag.none:g}"
        if self.required or value in (None, (), []) or self.flag.switch:
            return ""
        if isinstance(value, bool):
            return "on" if value else "off"
        return self.flag.show(value)

    def value(self, read: Any) -> Any:
        """Value of the field for a value from the command line."""
        return None if self.flag.none is not None and read == self.flag.none else read

    def help(self, *, whole: bool) -> str:
        """Help text; ``whole`` adds what takes time to make. "None:" becomes "Default:"."""
        text = self.flag.help
        if self.default is None and self.flag.none is None:
            text = text.replace("None:", "Default:")
        if whole and self.flag.more is not None:
            text += " " + self.flag.more()
        bounds = (self.flag.least, self.flag.above, self.flag.most, self.flag.below)
        if any(bound is not None for bound in bounds):
            allowed = self.flag.range(self.type).removeprefix("be ").removeprefix("lie ")
            none = self.flag.none
            if none is not None and not self.flag.allows(none):
                allowed = f"{none:g}, or {allowed}"
            text += f" [{allowed}]"
        return text


@dataclass(frozen=True, slots=True)
class FlagsOf:
    """Flags of one config dataclass that a command takes: fields whose type carries a `Flag`.

    Example: ``FlagsOf(ServerSettings, without=("role",))``.
    """

    config: type
    only: Collection[str] = ()
    """Fields; empty takes all."""
    without: Collection[str] = ()
    """Fields that are left out."""
    panel: str = ""
    """Makes flags, in this panel, of fields with a plain `Knob` as well: those of policies, which
    know nothing of a command line."""
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further names of such fields."""

    def __iter__(self) -> Iterator[CommandFlag]:
        for knob in _fields(self.config):
            name, flag = knob.name, knob.knob
            if (self.only and name not in self.only) or name in self.without:
                continue
            if not isinstance(flag, Flag):
                if not self.panel:
                    continue
                flag = _as_flag(flag, self.panel, self.also.get(name, ()))
            yield CommandFlag(self.config, name, knob.type, knob.default, flag)


def _fields(config: type) -> Iterator[KnobField]:
    """Fields of a dataclass, or of a struct that files are read into."""
    if is_dataclass(config):
        yield from knobs_of(config).values()
        return
    hints = get_type_hints(config, include_extras=True)
    for info in msgspec.structs.fields(config):
        kind, *extras = get_args(hints[info.name]) or (hints[info.name],)
        flags = [extra for extra in extras if isinstance(extra, Flag)]
        if flags:
            factory = info.default_factory
            default = info.default if factory is msgspec.NODEFAULT else factory()
            yield KnobField(info.name, kind, default, flags[0])


def _as_flag(knob: Knob, panel: str, also: tuple[str, ...]) -> Flag:
    bounds = {name: getattr(knob, name) for name in Knob.__dataclass_fields__}
    return Flag(**bounds, panel=panel, also=also)
