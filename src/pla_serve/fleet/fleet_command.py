"""``pla-serve fleet``: a fleet on this machine from flags or a file, and how it is doing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from pla_serve.command_line import HELP_FLAGS, CliCommand, CommandGroup, Given, fail
from pla_serve.flags import Flag, FlagsOf
from pla_serve.fleet.forwarding import check_words, passed_on, split_words
from pla_serve.fleet.supervisor.spec import FleetSpec, Pools, check, read_spec
from pla_serve.server.settings import LogSettings

if TYPE_CHECKING:
    from pla_serve.fleet.supervisor.launch import LaunchPlan


@dataclass(frozen=True, slots=True)
class StartFlags:
    """Flags of ``fleet start`` that are no fields of a fleet."""

    config: Annotated[
        Path | None, Flag("YAML file that describes the fleet; flags go before what it says.")
    ] = None
    serve_word: Annotated[tuple[str, ...], Flag("Word for each instance.", hidden=True)] = ()
    route_word: Annotated[tuple[str, ...], Flag("Word for the router.", hidden=True)] = ()


@dataclass(frozen=True, slots=True)
class StatusFlags:
    """Flags of ``fleet status``."""

    url: Annotated[str, Flag("Address of the router.")] = "http://127.0.0.1:8000"
    api_key: Annotated[
        str | None, Flag("API key that the router asks for.", variable="PLA_SERVE_API_KEY")
    ] = None
    json: Annotated[bool, Flag("Print the router's JSON instead of a table.", switch=True)] = False


def start(given: Given) -> int:
    """Run a fleet until SIGTERM."""
    try:
        plan = _plan(check(_spec(given)), given)
    except (ValueError, OSError) as error:
        fail(error)
    return plan.run()


def status(given: Given) -> int:
    """Print what the router knows of its instances."""
    from pla_serve.fleet.status_view import StatusError, fetch, show

    flags = given.make(StatusFlags)
    try:
        content = fetch(flags.url, flags.api_key)
    except StatusError as error:
        fail(error)
    show(content, as_json=flags.json)
    return 0


START = CliCommand(
    "start",
    start,
    (FlagsOf(FleetSpec), FlagsOf(Pools), FlagsOf(StartFlags), FlagsOf(LogSettings)),
    help="Start a fleet (`start` may be left out). SIGTERM drains it, SIGHUP restarts it in turn.",
)
START = replace(START, help=f"{START.help} {passed_on(START)}")
STATUS = CliCommand(
    "status", status, (FlagsOf(StatusFlags),), help="Show what each instance of a fleet does now."
)


def rewrite(words: list[str]) -> list[str]:
    """Words behind ``fleet`` as `START` or `STATUS` takes them.

    >>> rewrite(["MODEL", "--short", "2", "--seed=1"])
    ['start', 'MODEL', '--short', '2', '--serve-word=--seed=1']
    """
    if not words or words[0] == STATUS.name or words[0] in HELP_FLAGS:
        return words
    own, forwarded = split_words(words[words[0] == START.name :], START)
    return [
        START.name,
        *own,
        *(f"--serve-word={word}" for word in forwarded.serve),
        *(f"--route-word={word}" for word in forwarded.route),
    ]


FLEET = CommandGroup(
    "fleet",
    (START, STATUS),
    rewrite,
    help="Serve a model with several instances on this machine, behind one API. "
    "`pla-serve fleet MODEL --short 2 --long 1 --decode 1` starts a fleet. It takes the flags of "
    "`serve`, for its instances, and those of `route`, for the router before them; "
    "`pla-serve fleet start --help` lists them.",
)


def _spec(given: Given) -> FleetSpec:
    """The file's fleet, changed by flags.

    Raises:
        ValueError: the file is none of a fleet.
        OSError: it cannot be read.
    """
    config = given.make(StartFlags).config
    spec = FleetSpec() if config is None else read_spec(config)
    changed = given.fields(FleetSpec)
    if pools := given.fields(Pools):
        changed["instances"] = Pools(**pools)
    return msgspec.structs.replace(spec, **changed)


def _plan(spec: FleetSpec, given: Given) -> LaunchPlan:
    """All command lines of the fleet, checked.

    Raises:
        ValueError: a process would refuse its flags.
        OSError: no ports are free.
    """
    from pla_serve.fleet.supervisor.launch import LaunchPlan

    words, logs = given.make(StartFlags), given.make(LogSettings)
    to_all = ("--log-level", logs.level, "--log-format", logs.form)
    plan = LaunchPlan(
        spec, (*words.serve_word, *to_all), (*words.route_word, *to_all), logs.level, logs.form
    )
    try:
        for name, command in plan.commands():
            check_words(name, command)
    except (ValueError, OSError):
        plan.close()
        raise
    return plan
