"""The command line: ``pla-serve serve``, ``fleet``, ``route``, ``bench``, ``calibrate`` …"""

from __future__ import annotations

import typer

from pla_serve import __version__
from pla_serve.bench.command import bench
from pla_serve.bench.profile_command import calibrate
from pla_serve.fleet.fleet_command import fleet
from pla_serve.fleet.route_command import route
from pla_serve.server.command import serve
from pla_serve.simulator.command import simulate

app = typer.Typer(
    name="pla-serve",
    help="LLM serving that answers short prompts as if the machine were idle.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Options that belong to no command."""


app.command()(serve)
app.command()(route)
app.add_typer(fleet, name="fleet")
app.command()(bench)
app.command()(calibrate)
app.command()(simulate)


if __name__ == "__main__":
    app()
