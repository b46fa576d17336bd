"""The command line: ``pla-serve serve``, ``fleet``, ``route``, ``bench``, ``calibrate`` …"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pla_serve.command_line import LazyCommand, run_command

ABOUT = "LLM serving that answers short prompts as if the machine were idle."
COMMANDS = (
    LazyCommand("serve", "Serve a model to OpenAI clients.", "pla_serve.server.command:SERVE"),
    LazyCommand(
        "fleet",
        "Serve a model with several instances on this machine, behind one API.",
        "pla_serve.fleet.fleet_command:FLEET",
    ),
    LazyCommand(
        "route",
        "Route the requests of OpenAI clients to instances of one model.",
        "pla_serve.fleet.route_command:ROUTE",
    ),
    LazyCommand(
        "batch",
        "Answer a file of requests, without a server or through one; a run can be resumed.",
        "pla_serve.server.file_run.command:BATCH",
    ),
    LazyCommand(
        "bench",
        "Measure a server under load: TTFT, ITL, throughput and goodput of short and long prompts.",
        "pla_serve.bench.command:BENCH",
    ),
    LazyCommand(
        "calibrate",
        "Measure a running engine into a machine profile for pla-serve simulate --machine.",
        "pla_serve.bench.profile_command:CALIBRATE",
    ),
    LazyCommand(
        "simulate",
        "Compare policies against a model of the machine, on virtual time.",
        "pla_serve.simulator.command:SIMULATE",
    ),
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that ``words`` name; None takes them from the process.

    Returns:
        The exit status.
    """
    return run_command(COMMANDS, sys.argv[1:] if words is None else words, ABOUT)


if __name__ == "__main__":
    sys.exit(main())
