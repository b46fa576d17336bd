"""Flags of ``serve`` and ``route`` on the command line of ``fleet``, and the way to the processes.

``pla-serve fleet MODEL --short 2 --kv-cache-gib 1 --routing round-robin`` starts instances with
``--kv-cache-gib 1`` and a router with ``--routing round-robin``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, KeysView, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from pla_serve.command_line import HELP_FLAGS, CliCommand, parse
from pla_serve.fleet import route_command
from pla_serve.fleet.supervisor.commands import KEY_TIER_VARIABLE
from pla_serve.server import command as serve_command

BOTH = frozenset({"--load-format", "--max-model-len", "--seed"})
"""Flags that instances and router need alike. Any other flag that the router has is for it alone:
clients talk to the router."""


class Forwarded(NamedTuple):
    """Words of the command line that are not the fleet's own."""

    serve: tuple[str, ...] = ()
    route: tuple[str, ...] = ()


def split_words(words: Sequence[str], own: CliCommand) -> tuple[list[str], Forwarded]:
    """Words of the command ``own``, and those for ``serve`` and ``route``."""
    names = {*options_of(own), *HELP_FLAGS}
    return split(words, names, options_of(serve_command.SERVE), options_of(route_command.ROUTE))


def split(
    words: Sequence[str],
    own: set[str],
    serve: dict[str, bool],
    route: dict[str, bool],
) -> tuple[list[str], Forwarded]:
    """Words that are the fleet's own, and those of others by whom they are for.

    Args:
        own: names of the fleet's flags.
        serve, route: names of the flags of these commands, and whether each stands without a
            value.
    """
    rest: list[str] = []
    to_serve: list[str] = []
    to_route: list[str] = []
    left = iter(words)
    for word in left:
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
        group = [word] if alone or equals else [word, *_next(left)]
        for target in targets:
            target += group
    return rest, Forwarded(tuple(to_serve), tuple(to_route))


def _next(words: Iterator[str]) -> tuple[str, ...]:
    word = next(words, None)
    return () if word is None else (word,)


def passed_on(own: CliCommand) -> str:
    """Return sentences for the help that name the flags that the command ``own`` passes on."""
    taken = options_of(own).keys()
    route = _shown(route_command.ROUTE, taken)
    routed = options_of(route_command.ROUTE).keys() - BOTH
    serve = [name for name in _shown(serve_command.SERVE, taken) if name not in routed]
    return (
        f"Each instance gets, described by `pla-serve serve --help`: {', '.join(serve)}. "
        f"The router gets, described by `pla-serve route --help`: {', '.join(route)}."
    )


def _shown(command: CliCommand, taken: KeysView[str]) -> list[str]:
    """Return the first names of the flags in the help of a command, but for those in ``taken``."""
    flags = [flag for flag in command.flags if flag.names and not flag.flag.hidden]
    return [flag.names[0] for flag in flags if taken.isdisjoint(flag.names)]


def options_of(command: CliCommand) -> dict[str, bool]:
    """Names of the flags of a command, and whether each stands without a value."""
    options: dict[str, bool] = {}
    for flag in command.flags:
        options |= dict.fromkeys(flag.names, flag.value_type is bool)
        if flag.off_name is not None:
            options[flag.off_name] = True
    return options


def check_words(name: str, words: Sequence[str]) -> None:
    """Check that a process would take these words, before any process is started.

    Args:
        name: ``serve`` or ``route``.

    Raises:
        ValueError: it would not; the message says why.
        OSError: a file that they name cannot be read.
    """
    try:
        if name == "serve":
            with _without(KEY_TIER_VARIABLE):
                serve_command.read(parse(serve_command.SERVE, words))
        else:
            route_command.read(parse(route_command.ROUTE, words))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@contextmanager
def _without(variable: str) -> Iterator[None]:
    """Leave a variable out of the environment, as for instances, which have no tiers."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value
