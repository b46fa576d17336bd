"""``pla-serve fleet``: a fleet on this machine from flags or a file, and how it is doing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from pla_serve.fleet.fleet_flags import (
    FORWARDED,
    FleetGroup,
    Forwarded,
    StartCommand,
    check_words,
)
from pla_serve.server.flags import LogFormat, LogLevel

fleet = typer.Typer(cls=FleetGroup, no_args_is_help=True)

POOLS = "Instances"


@fleet.callback()
def about() -> None:
    """Serve a model with several instances on this machine, behind one API.

    `pla-serve fleet MODEL --short 2 --long 1 --decode 1` starts a fleet. It takes the flags of
    `serve`, for its instances, and those of `route`, for the router before them.
    """


@fleet.command(cls=StartCommand)
def start(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="As `pla-serve serve` takes it.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file; flags go before what it says.")
    ] = None,
    mixed: Annotated[
        int | None,
        typer.Option(min=0, help="Instances for all requests.", rich_help_panel=POOLS),
    ] = None,
    short: Annotated[
        int | None,
        typer.Option(min=0, help="Instances for short prompts.", rich_help_panel=POOLS),
    ] = None,
    long: Annotated[
        int | None,
        typer.Option(min=0, help="Instances for long prompts.", rich_help_panel=POOLS),
    ] = None,
    decode: Annotated[
        int | None,
        typer.Option(
            min=0, help="Instances that take over after the first token.", rich_help_panel=POOLS
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of each. Default: its share.", rich_help_panel=POOLS),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Given out to instances in turn, as in cuda:0,cuda:1.", rich_help_panel=POOLS
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where clients come in. 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="8000.")] = None,
    drain_seconds: Annotated[
        float | None, typer.Option(help="How long SIGTERM lets requests finish. 30.")
    ] = None,
    log_level: LogLevel = "info",
    log_format: LogFormat = "text",
) -> None:
    """Start a fleet (`start` may be left out). SIGTERM drains it, SIGHUP restarts it in turn."""
    from pla_serve.fleet.supervisor.spec import check

    given = {
        "model": model,
        "host": host,
        "port": port,
        "threads": threads,
        "devices": devices.split(",") if devices else None,
        "drain_seconds": drain_seconds,
    }
    pools = {"mixed": mixed, "short": short, "long": long, "decode": decode}
    forwarded: Forwarded = context.meta.get(FORWARDED, Forwarded())
    try:
        spec = check(_merged(config, given, pools))
        plan = _plan(spec, forwarded, log_level, log_format)
    except (ValueError, OSError) as error:
        _fail(error)
    raise typer.Exit(plan.run())


@fleet.command()
def status(
    url: Annotated[str, typer.Option(help="The router.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="PLA_SERVE_API_KEY", show_envvar=True)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As the router says it.")] = False,
) -> None:
    """What each instance of a fleet does now."""
    from pla_serve.fleet.status_view import StatusError, fetch, show

    try:
        content = fetch(url, api_key)
    except StatusError as error:
        _fail(error)
    show(content, as_json=json)


def _merged(config: Path | None, given: dict[str, Any], pools: dict[str, Any]) -> Any:
    """The file's fleet with what was given by flag."""
    import msgspec

    from pla_serve.fleet.supervisor.spec import FleetSpec, Pools, read_spec

    spec = FleetSpec() if config is None else read_spec(config)
    counts = {role: count for role, count in pools.items() if count is not None}
    if counts:
        given["instances"] = Pools(**counts)
    changed = {name: value for name, value in given.items() if value is not None}
    return msgspec.structs.replace(spec, **changed)


def _plan(spec: Any, forwarded: Forwarded, log_level: str, log_format: Any) -> Any:
    """What will be run; all flags of all processes have been checked.

    Raises:
        ValueError: a process would refuse its flags.
        OSError: no ports are free.
    """
    from pla_serve.fleet.supervisor.launch import LaunchPlan

    logs = ["--log-level", log_level, "--log-format", log_format]
    plan = LaunchPlan(
        spec, (*forwarded.serve, *logs), (*forwarded.route, *logs), log_level, log_format
    )
    try:
        for name, command in plan.commands():
            check_words(name, command)
    except ValueError:
        plan.close()
        raise
    return plan


def _fail(error: Exception) -> NoReturn:
    print(f"pla-serve: {error}", file=sys.stderr)
    raise typer.Exit(1)
