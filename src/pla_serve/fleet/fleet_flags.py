"""Flags of ``pla-serve fleet``, and how those of ``serve`` and ``route`` get to the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
"""What a parser raises: click's, or that of typer's own copy of click, by its version."""
FORWARDED = "pla_serve.forwarded"
"""Where a context keeps the words for other commands."""

BOTH = frozenset({"--load-format", "--max-model-len", "--seed"})
"""Flags that instances and router need alike. Otherwise one that the router has is for it alone:
clients talk to the router."""


class Forwarded(NamedTuple):
    """Words of the command line that are not the fleet's own."""

    serve: tuple[str, ...] = ()
    route: tuple[str, ...] = ()


class FleetGroup(TyperGroup):
    """``pla-serve fleet …`` is ``pla-serve fleet start …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["start", *args]
        return super().parse_args(ctx, args)


class StartCommand(TyperCommand):
    """Takes the flags of ``serve`` and ``route`` as well, and keeps them for those."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in parameter.opts}
        own |= set(ctx.help_option_names)
        rest, forwarded = split(args, own, options_of("serve"), options_of("route"))
        ctx.meta[FORWARDED] = forwarded
        return super().parse_args(ctx, rest)


def split(
    args: Sequence[str],
    own: set[str],
    serve: dict[str, bool],
    route: dict[str, bool],
) -> tuple[list[str], Forwarded]:
    """The words that are the fleet's own, and those of others by whom they are for.

    Args:
        serve, route: flags of these commands, and whether each stands without a value.
    """
    rest: list[str] = []
    to_serve: list[str] = []
    to_route: list[str] = []
    words = iter(args)
    for word in words:
        name, equals, _ = word.partition("=")
        targets = []
        if name not in own and name.startswith("--"):
            if name in route:
                targets.append(to_route)
            if name in serve and (name not in route or name in BOTH):
                targets.append(to_serve)
        if not targets:
            rest.append(word)
            continue
        alone = route[name] if name in route else serve[name]
        group = [word] if alone or equals else [word, *_next(words)]
        for target in targets:
            target += group
    return rest, Forwarded(tuple(to_serve), tuple(to_route))


def _next(words: Any) -> tuple[str, ...]:
    word = next(words, None)
    return () if word is None else (word,)


def options_of(name: str) -> dict[str, bool]:
    """Flags of a command, and whether each stands without a value."""
    return {
        option: bool(getattr(parameter, "is_flag", False))
        for parameter in command_of(name).params
        if parameter.param_type_name == "option"
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def check_words(name: str, words: Sequence[str]) -> None:
    """Raises:
    ValueError: ``pla-serve`` would not take these words for this command; says why.
    """
    try:
        with command_of(name).make_context(name, list(words)):
            pass
    except USAGE_ERROR as error:
        raise ValueError(f"{name}: {error.format_message()}") from None


def command_of(name: str) -> Any:
    """``serve`` or ``route`` as a parser."""
    from pla_serve.fleet.route_command import route
    from pla_serve.server.command import serve

    functions: dict[str, Callable[..., Any]] = {"serve": serve, "route": route}
    app = typer.Typer(add_completion=False)
    app.command(name)(functions[name])
    return typer.main.get_command(app)
