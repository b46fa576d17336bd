"""Commands made of the flags of config dataclasses; cyclopts parses and shows the help.

    @dataclass(frozen=True, slots=True)
    class Greeting:
        name: Annotated[str, Flag("Who is greeted.")] = "you"

    def greet(given: Given) -> int:
        print("Hello", given.make(Greeting).name)
        return 0

    GREET = CliCommand("greet", greet, (FlagsOf(Greeting),))

What cannot be read (an unknown flag, no number, no such choice) is a usage error: a message on
standard error, exit status 2. What can be read and is refused, such as a value out of range, is for
`fail`: one line on standard error, exit status 1.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Annotated, Any, NoReturn, TypeVar, get_args

import cyclopts

from pla_serve import __version__
from pla_serve.flags import CommandFlag, FlagsOf

Config = TypeVar("Config")
HELP_FLAGS = ("--help", "-h")


def fail(error: Exception | str) -> NoReturn:
    """Say in one line what the user can mend, and exit with status 1.

    Raises:
        SystemExit: always.
    """
    print(f"pla-serve: {error}", file=sys.stderr)
    raise SystemExit(1)


class Given:
    """Values that a command line and the environment gave, by config dataclass and field."""

    def __init__(self, values: Mapping[tuple[type, str], Any]) -> None:
        self._values = values

    def make(self, config: type[Config], /, **fields: Any) -> Config:
        """An object of ``config``: ``fields`` go before flags, flags before defaults.

        Raises:
            ValueError: a value is out of range, as the dataclass says.
        """
        return config(**{**self.fields(config), **fields})

    def fields(self, config: type) -> dict[str, Any]:
        """Fields of ``config`` that were given, with their values."""
        return {field: value for (kind, field), value in self._values.items() if kind is config}

    def record(self, command: CliCommand) -> dict[str, Any]:
        """Values of all flags of a command by name, as in ``max_batch_tokens``, for a record."""
        return {
            flag.record_name: self._values.get((flag.config, flag.field), flag.default)
            for flag in command.flags
        }


@dataclass(frozen=True, slots=True)
class CliCommand:
    """A word of the command line, and the flags behind it."""

    name: str
    run: Callable[[Given], int]
    """Called with what was given; returns the exit status."""
    configs: tuple[FlagsOf, ...] = ()
    panels: tuple[str, ...] = ()
    """Panels in the order of the help; others follow in the order of their flags."""
    help: str = ""
    """Description of the command, for the help."""

    @property
    def flags(self) -> tuple[CommandFlag, ...]:
        """All flags, in the order of the help.

        Raises:
            ValueError: two flags have one name.
        """
        flags = tuple(flag for config in self.configs for flag in config)
        names = [name for flag in flags for name in flag.names]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{self.name} has two flags of the name {', '.join(sorted(twice))}")
        return flags


@dataclass(frozen=True, slots=True)
class CommandGroup:
    """A word with commands behind it, as in ``pla-serve fleet status``."""

    name: str
    commands: tuple[CliCommand, ...]
    rewrite: Callable[[list[str]], list[str]] = list
    """Changes the words behind the name before they are parsed."""
    help: str = ""


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """A command that is imported only when it is called, so that ``--help`` is quick."""

    name: str
    help: str
    """Description of the command, for the help."""
    place: str
    """Module and name of a `CliCommand` or `CommandGroup`: ``package.module:NAME``."""

    def load(self) -> CliCommand | CommandGroup:
        """The command, with this help unless it has a longer one."""
        module, _, name = self.place.partition(":")
        command: CliCommand | CommandGroup = getattr(import_module(module), name)
        return command if command.help else replace(command, help=self.help)


def run_command(commands: Sequence[LazyCommand], words: Sequence[str], about: str) -> int:
    """Parse the words behind ``pla-serve`` and run the command that they name.

    Returns:
        The exit status.

    Raises:
        SystemExit: the words could not be read (status 2), or the command called `fail` (1).
    """
    words = list(words)
    wanted = next((command for command in commands if command.name in words[:1]), None)
    app = _app("pla-serve", about)
    for other in commands:
        if other is not wanted:
            app.command(_never_called, name=other.name, help=other.help)
    if wanted is not None:
        command, behind = wanted.load(), words[1:]
        if isinstance(command, CommandGroup):
            behind = command.rewrite(behind)
        words = [wanted.name, *behind]
        _add(app, command, whole_help=not {*HELP_FLAGS}.isdisjoint(behind))
    return int(app(words, result_action="return_value") or 0)


def _never_called() -> None:
    """Stands for a command in the list of all."""


def parse(command: CliCommand, words: Sequence[str]) -> Given:
    """Parse the words behind a command without running it.

    Raises:
        ValueError: they cannot be read; the message says why.
    """
    app = _app("pla-serve", "")
    _add(app, command, whole_help=False)
    try:
        _, bound, _ = app.parse_args([command.name, *words], exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise ValueError(str(error)) from None
    return _given(command.flags, bound.arguments)


def _app(name: str, about: str) -> cyclopts.App:
    return cyclopts.App(
        name=name,
        help=about,
        help_flags=HELP_FLAGS,
        version=__version__,
        help_format="plaintext",
        group_arguments=cyclopts.Group("Arguments", sort_key=-2),
        group_parameters=cyclopts.Group("Options", sort_key=-1),
    )


def _add(app: cyclopts.App, command: CliCommand | CommandGroup, *, whole_help: bool) -> None:
    if isinstance(command, CommandGroup):
        below = _app(command.name, command.help)
        for one in command.commands:
            _add(below, one, whole_help=whole_help)
        app.command(below, name=command.name)
    else:
        app.command(_function(command, whole_help), name=command.name, help=command.help)


def _function(command: CliCommand, whole_help: bool) -> Callable[..., int]:
    """A function whose signature is the command's flags: the form in which cyclopts takes them."""
    flags = command.flags
    panels = list(dict.fromkeys([*command.panels, *(flag.flag.panel for flag in flags)]))
    signature = inspect.Signature(
        sorted(
            (_parameter(flag, panels.index(flag.flag.panel), whole_help) for flag in flags),
            key=lambda parameter: parameter.kind,
        )
    )

    def function(*args: Any, **kwargs: Any) -> int:
        return command.run(_given(flags, signature.bind(*args, **kwargs).arguments))

    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _parameter(flag: CommandFlag, panel: int, whole_help: bool) -> inspect.Parameter:
    kind: Any = inspect.Parameter.KEYWORD_ONLY
    hint, default = flag.type, flag.default
    if flag.flag.read is not None:
        hint, default = Any, None  # one word, whatever is made of it
    if flag.required:
        default = inspect.Parameter.empty
    if flag.flag.argument and flag.repeats:
        kind, hint = inspect.Parameter.VAR_POSITIONAL, get_args(flag.type)[0]
        default = inspect.Parameter.empty
    elif flag.flag.argument:
        kind = inspect.Parameter.POSITIONAL_ONLY
    details = _details(flag, panel, whole_help)
    return inspect.Parameter(
        _identifier(flag), kind, default=default, annotation=Annotated[hint, details]
    )


def _details(flag: CommandFlag, panel: int, whole_help: bool) -> cyclopts.Parameter:
    details = flag.flag
    read = details.read
    more: dict[str, Any] = {}
    if flag.names:
        more["name"] = flag.names
    if details.panel:
        more["group"] = cyclopts.Group(details.panel, sort_key=panel)
    if read is not None:
        more["converter"] = lambda _, tokens: read(tokens[0].value)
    return cyclopts.Parameter(
        help=flag.help(whole=whole_help),
        negative=flag.off_name or (),
        env_var=details.variable or None,
        metavar=details.metavar or details.unit.upper() or None,
        show=not details.hidden,
        show_default=flag.default_text or False,
        **more,
    )


def _identifier(flag: CommandFlag) -> str:
    """Name of the parameter of a flag; that of an argument is shown in the help."""
    return flag.field if flag.flag.argument else f"{flag.config.__name__}_{flag.field}"


def _given(flags: Sequence[CommandFlag], arguments: Mapping[str, Any]) -> Given:
    return Given(
        {
            (flag.config, flag.field): flag.value(arguments[_identifier(flag)])
            for flag in flags
            if _identifier(flag) in arguments
        }
    )
