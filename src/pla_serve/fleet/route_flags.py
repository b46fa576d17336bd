"""The flags of ``pla-serve route`` that ``serve`` does not have."""

from __future__ import annotations

from typing import Annotated

import typer

FLEET = "Instances"
ROUTING = "Routing"
FAULTS = "Faults"


def _known_routing(text: str) -> str:
    from pla_serve.policy.routing.registry import parse_routing  # with numpy

    if text == "auto":
        return text
    try:
        parse_routing(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _known_controller(text: str) -> str:
    from pla_serve.policy.pools.registry import parse_controller

    if text == "off":
        return text
    try:
        parse_controller(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}, or off") from None
    return text


Instances = Annotated[
    list[str],
    typer.Option(
        "--instance",
        metavar="URL",
        help="An instance, as http://HOST:PORT; repeat it for each. vllm+http:// and "
        "sglang+http:// are servers of those kinds.",
        rich_help_panel=FLEET,
    ),
]
InstanceKey = Annotated[
    str | None,
    typer.Option(
        envvar="PLA_SERVE_INSTANCE_KEY",
        help="API key that the instances ask for.",
        rich_help_panel=FLEET,
        show_envvar=True,
    ),
]
Liveness = Annotated[
    float | None,
    typer.Option(
        help="An instance that is silent so long is lost. Seconds; more than its longest layer. "
        "Default: 2, for the heartbeat of our instances; 5, for an answer to /health of others.",
        rich_help_panel=FAULTS,
    ),
]
CircuitFailures = Annotated[
    int,
    typer.Option(help="Failures in a row after which one is left alone.", rich_help_panel=FAULTS),
]
CircuitSeconds = Annotated[
    float,
    typer.Option(
        help="How long it is left alone at first; it doubles up to a minute.",
        rich_help_panel=FAULTS,
    ),
]
MaxFailures = Annotated[
    int,
    typer.Option(
        help="Instances that may fail one request without a token in between.",
        rich_help_panel=FAULTS,
    ),
]
Routing = Annotated[
    str,
    typer.Option(
        callback=_known_routing,
        metavar="NAME[:KNOB=VALUE]...",
        help="auto: class-pools while there are short or long instances, predicted otherwise. "
        "Others: round-robin, least-loaded, cache-aware.",
        rich_help_panel=ROUTING,
    ),
]
MaxPredictedWait = Annotated[
    float,
    typer.Option(
        help="Where more would have to be waited for, in seconds, keys that use more than their "
        "share are refused (429); 0: never.",
        rich_help_panel=ROUTING,
    ),
]
ListenFd = Annotated[
    int | None,
    typer.Option(hidden=True, help="A listening socket that the supervisor holds."),
]
LeaseSeconds = Annotated[
    float,
    typer.Option(
        help="How long KV is kept for a hand-over without progress.", rich_help_panel=FAULTS
    ),
]
Controller = Annotated[
    str,
    typer.Option(
        callback=_known_controller,
        metavar="NAME[:KNOB=VALUE]...",
        help="Moves instances between short, long and decode: balance, pressure (as published), or "
        "off. One router of several may.",
        rich_help_panel=ROUTING,
    ),
]
ControlSeconds = Annotated[
    float,
    typer.Option(help="Time between two decisions of the controller.", rich_help_panel=ROUTING),
]
