"""``pla-serve simulate``: from flags to a sweep and its report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RUNS, MACHINE, ARRIVALS, FLEET, OUTPUT = (
    "What to run",
    "Machine",
    "Arrivals",
    "Several instances",
    "Output",
)


def simulate(
    trace: Annotated[
        str,
        typer.Option(
            help="Traces, separated by commas: files, gen:KIND, or mix:A@0.9+B@0.1, with "
            ":key=value; see docs/traces.md.",
            rich_help_panel=RUNS,
        ),
    ],
    policy: Annotated[
        str,
        typer.Option(
            help="Policies, separated by commas, with knobs: fcfs,hrrn:max-batch-tokens=2048.",
            rich_help_panel=RUNS,
        ),
    ] = "fcfs,hrrn,srpt,flowprefill,length-aware",
    load: Annotated[
        str | None,
        typer.Option(
            help="Offered work over capacity, separated by commas. Default: 0.7.",
            rich_help_panel=RUNS,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.", rich_help_panel=RUNS)] = 0,
    requests: Annotated[
        int | None,
        typer.Option(min=1, help="Only the first of each trace.", rich_help_panel=RUNS),
    ] = None,
    max_input_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Longer prompts are left out. Default: 131,072, or what the KV memory holds.",
            rich_help_panel=RUNS,
        ),
    ] = None,
    machine: Annotated[
        str,
        typer.Option(
            help="A name (an unknown one lists them), or a .json file as pla-serve calibrate "
            "writes it.",
            rich_help_panel=MACHINE,
        ),
    ] = "h200-qwen2.5-32b",
    mode: Annotated[
        Literal["prefill", "mix", "pd-temporal", "pd-spatial"],
        typer.Option(
            help="Where answers decode: elsewhere, not simulated; in the batches of prefills; "
            "while no prefill waits; on --decode-instances.",
            rich_help_panel=MACHINE,
        ),
    ] = "prefill",
    preemption: Annotated[
        bool,
        typer.Option(
            "--preemption/--no-preemption",
            help="Whether a prefill can be left at a layer boundary.",
            rich_help_panel=MACHINE,
        ),
    ] = True,
    kv_tokens: Annotated[
        str | None,
        typer.Option(
            help="A prefix cache of so many tokens on each instance, or 'machine'. Default: the "
            "trace says what is cached.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(
            min=1, help="A closed loop of so many, in place of --load.", rich_help_panel=ARRIVALS
        ),
    ] = None,
    wait_for_answers: Annotated[
        bool,
        typer.Option(
            "--wait-for-answers",
            help="A session's next turn comes no earlier than the answer and the thought.",
            rich_help_panel=ARRIVALS,
        ),
    ] = False,
    token_seconds: Annotated[
        float | None,
        typer.Option(
            help="Mode prefill: between two tokens of an answer that a next turn waits for. "
            "Default: a decode step alone.",
            rich_help_panel=ARRIVALS,
        ),
    ] = None,
    max_pause: Annotated[
        float | None,
        typer.Option(
            help="Longest pause of sessions that have clocks of their own. Default: 600 s.",
            rich_help_panel=ARRIVALS,
        ),
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="That prefill.", rich_help_panel=FLEET)] = 1,
    decode_instances: Annotated[
        int, typer.Option(min=0, help="For mode pd-spatial.", rich_help_panel=FLEET)
    ] = 0,
    routing: Annotated[
        str | None,
        typer.Option(
            help="round-robin, least-loaded, cache-aware, class-pools or predicted, with knobs. "
            "Default: predicted, or class-pools where there are pools.",
            rich_help_panel=FLEET,
        ),
    ] = None,
    short_instances: Annotated[
        int,
        typer.Option(
            min=0, help="So many are a pool for short prompts; 0: no pools.", rich_help_panel=FLEET
        ),
    ] = 0,
    pool_controller: Annotated[
        Literal["pressure", "balance"] | None,
        typer.Option(
            help="Moves instances between the pools: as published, or in seconds of work.",
            rich_help_panel=FLEET,
        ),
    ] = None,
    fetch_kv: Annotated[
        bool,
        typer.Option(
            "--fetch-kv",
            help="Prefixes may be fetched from other instances' caches.",
            rich_help_panel=FLEET,
        ),
    ] = False,
    fail_every: Annotated[
        float | None,
        typer.Option(help="Mean seconds from start to failure.", rich_help_panel=FLEET),
    ] = None,
    down_seconds: Annotated[
        float | None,
        typer.Option(
            help="From a failure until the instance serves again. Default: 30.",
            rich_help_panel=FLEET,
        ),
    ] = None,
    slo_seconds: Annotated[
        float,
        typer.Option(
            help="A first token is in time within this, or --slo-stretch times the request's time "
            "alone.",
            rich_help_panel=OUTPUT,
        ),
    ] = 0.4,
    slo_stretch: Annotated[
        float, typer.Option(help="See --slo-seconds.", rich_help_panel=OUTPUT)
    ] = 5.0,
    json: Annotated[
        Path | None, typer.Option(help="Writes all numbers.", rich_help_panel=OUTPUT)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Writes a PNG.", rich_help_panel=OUTPUT)] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Runs at the same time. Default: one a core.", rich_help_panel=OUTPUT
        ),
    ] = None,
) -> None:
    """Policies against a model of the machine, on virtual time."""
    from pla_serve.simulator.flags import Flags, execute
    from pla_serve.simulator.parallel import WorkerError

    flags = Flags(
        trace=trace,
        policy=policy,
        load=load,
        seed=seed,
        requests=requests,
        max_input_tokens=max_input_tokens,
        machine=machine,
        mode=mode,
        preemption=preemption,
        kv_tokens=kv_tokens,
        clients=clients,
        wait_for_answers=wait_for_answers,
        token_seconds=token_seconds,
        max_pause=max_pause,
        instances=instances,
        decode_instances=decode_instances,
        routing=routing,
        short_instances=short_instances,
        pool_controller=pool_controller,
        fetch_kv=fetch_kv,
        fail_every=fail_every,
        down_seconds=down_seconds,
        slo_seconds=slo_seconds,
        slo_stretch=slo_stretch,
        json=json,
        plot=plot,
        jobs=jobs,
    )
    try:
        code = execute(flags)
    except (ValueError, OSError, WorkerError) as error:
        typer.secho(f"pla-serve: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None
    raise typer.Exit(code)
