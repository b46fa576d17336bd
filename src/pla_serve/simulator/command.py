"""``pla-serve simulate``: from flags to a sweep, run and reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from rich.console import Console

from pla_serve.command_line import CliCommand, Given, fail
from pla_serve.environment import describe, usable_cores
from pla_serve.flags import Flag, FlagsOf
from pla_serve.policy.knobs import check_knobs
from pla_serve.simulator.machine import Machine, load_machine
from pla_serve.simulator.parallel import WorkerError
from pla_serve.simulator.progress import run_sweep
from pla_serve.simulator.report import RunReport, save
from pla_serve.simulator.run import SHORT_TOKENS
from pla_serve.simulator.setting import (
    ARRIVALS,
    FLEET,
    MACHINE,
    OUTPUT,
    RUNS,
    FleetSetting,
    Objective,
    Setting,
)
from pla_serve.simulator.sweep import Sweep
from pla_serve.simulator.table import tables
from pla_serve.traces.load import Trace, load_trace

LONGEST_INPUT = 131_072
"""Tokens; the models of the machine files accept no longer prompts."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells know it."""


@dataclass(frozen=True, slots=True)
class SweepFlags:
    """Flags of ``simulate`` that say what is run, on what, and where the results go.

    Raises:
        ValueError: a field is out of range.
    """

    trace: Annotated[
        str,
        Flag(
            "Traces, separated by commas: files, gen:KIND, or mix:A@0.9+B@0.1, with :key=value; "
            "see docs/traces.md.",
            panel=RUNS,
        ),
    ]
    policy: Annotated[
        str,
        Flag(
            "Policies, separated by commas, with knobs: fcfs,hrrn:max-batch-tokens=2048.",
            panel=RUNS,
        ),
    ] = "fcfs,hrrn,srpt,flowprefill,length-aware"
    load: Annotated[
        str | None,
        Flag("Offered work over capacity, separated by commas. None: 0.7.", panel=RUNS),
    ] = None
    requests: Annotated[
        int | None,
        Flag("Only the first of each trace.", unit="requests", least=1, panel=RUNS),
    ] = None
    max_input_tokens: Annotated[
        int | None,
        Flag(
            "Longer prompts are left out. None: 131,072, or what the KV memory holds.",
            unit="tokens",
            least=1,
            panel=RUNS,
        ),
    ] = None
    machine: Annotated[
        str,
        Flag(
            "A name (an unknown one lists them), or a .json file as pla-serve calibrate writes it.",
            panel=MACHINE,
        ),
    ] = "h200-qwen2.5-32b"
    kv_tokens: Annotated[
        str | None,
        Flag(
            "A prefix cache of so many tokens on each instance, or 'machine'. None: the trace says "
            "what is cached.",
            unit="tokens",
            panel=MACHINE,
        ),
    ] = None
    json: Annotated[Path | None, Flag("File for all numbers.", panel=OUTPUT)] = None
    plot: Annotated[Path | None, Flag("File for a picture, .png.", panel=OUTPUT)] = None
    jobs: Annotated[
        int | None, Flag("Runs at the same time. None: one a core.", least=1, panel=OUTPUT)
    ] = None

    def __post_init__(self) -> None:
        check_knobs(self)


def simulate(given: Given) -> int:
    """Run a sweep and report it."""
    try:
        return execute(given)
    except (ValueError, OSError, WorkerError) as error:
        fail(error)


SIMULATE = CliCommand(
    "simulate",
    simulate,
    (FlagsOf(SweepFlags), FlagsOf(Setting), FlagsOf(FleetSetting), FlagsOf(Objective)),
    panels=(RUNS, MACHINE, ARRIVALS, FLEET, OUTPUT),
)


def execute(given: Given) -> int:
    """Run, show, save. Runs that are complete at Ctrl-C are reported.

    Returns:
        The exit status.

    Raises:
        ValueError: flags that make no sense, or a trace or machine that cannot be read.
        OSError: a result cannot be written.
    """
    console, status = Console(), Console(stderr=True)
    flags, setting = given.make(SweepFlags), setting_of(given)
    for path in (flags.json, flags.plot):
        if path is not None and path.is_dir():
            raise ValueError(f"{path} is a folder; give a file name")
    sweep = sweep_of(given, setting, status)
    runs: list[RunReport] = []
    interrupted = False
    try:
        run_sweep(sweep, flags.jobs or usable_cores(), status, runs)
    except KeyboardInterrupt:
        interrupted = True
        status.print(f"interrupted after {len(runs)} of {len(sweep)} runs", style="yellow")
    if runs:
        console.print(tables(runs))
        _save(flags, runs, _about(given, setting), status, interrupted=interrupted)
    return INTERRUPTED if interrupted else 0


def _save(
    flags: SweepFlags,
    runs: Sequence[RunReport],
    about: dict[str, object],
    status: Console,
    *,
    interrupted: bool,
) -> None:
    if flags.json is not None:
        save(flags.json, runs, about, interrupted=interrupted)
        status.print(f"saved {flags.json}", style="dim", highlight=False)
    if flags.plot is not None:
        from pla_serve.simulator.plot import draw

        draw(runs, flags.plot)
        status.print(f"saved {flags.plot}", style="dim", highlight=False)


def setting_of(given: Given) -> Setting:
    """Settings that all runs have in common.

    Raises:
        ValueError: flags do not go together, or the machine is not known.
    """
    flags = given.make(SweepFlags)
    machine = load_machine(flags.machine)
    fleet = given.fields(FleetSetting)
    if "down_seconds" in fleet and "fail_every" not in fleet:
        raise ValueError("--down-seconds needs --fail-every")
    return given.make(
        Setting,
        machine=machine,
        fleet=given.make(FleetSetting),
        kv_tokens=_kv_tokens(flags.kv_tokens, machine),
        objective=given.make(Objective),
    )


def sweep_of(given: Given, setting: Setting, status: Console) -> Sweep:
    """All runs; reads the traces.

    Raises:
        ValueError: a trace cannot be read, or there is nothing to run.
    """
    flags = given.make(SweepFlags)
    loads = _loads(flags.load, closed=setting.clients is not None)
    specs = _split("--trace", flags.trace)
    with status.status("reading traces"):
        traces = tuple(_trace(spec, flags, setting, status) for spec in specs)
    if "max_pause" in given.fields(Setting) and not any(trace.recorded for trace in traces):
        raise ValueError("--max-pause is for traces whose sessions have clocks of their own")
    return Sweep(traces, tuple(_split("--policy", flags.policy)), loads, setting)


def _trace(spec: str, flags: SweepFlags, setting: Setting, status: Console) -> Trace:
    limit = flags.max_input_tokens or min(LONGEST_INPUT, setting.machine.kv_tokens)
    trace = load_trace(spec, seed=setting.seed, max_input_tokens=limit, max_requests=flags.requests)
    if trace.left_out:
        status.print(
            f"{trace.name}: {trace.left_out:,} prompts of more than {limit:,} tokens left out",
            style="dim",
            highlight=False,
        )
    return trace


def _split(flag: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{flag} has an empty entry in {text!r}")
    if len(set(parts)) < len(parts):
        raise ValueError(f"{flag} names something twice in {text!r}")
    return parts


def _loads(text: str | None, *, closed: bool) -> tuple[float, ...]:
    if text is None:
        return () if closed else (0.7,)
    try:
        return tuple(float(part) for part in _split("--load", text))
    except ValueError as error:
        raise ValueError(f"--load takes numbers such as 0.7,0.9: {error}") from None


def _kv_tokens(text: str | None, machine: Machine) -> int | None:
    if text is None or text == "machine":
        return None if text is None else machine.kv_tokens
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--kv-tokens takes a whole number or 'machine', not {text!r}") from None


def _about(given: Given, setting: Setting) -> dict[str, object]:
    """Return the origin of the numbers, for the record."""
    flags: dict[str, Any] = given.record(SIMULATE)
    for name in ("json", "plot", "jobs"):
        del flags[name]
    flags["trace"] = ",".join(
        Path(part).name if part.startswith(("/", "~")) else part
        for part in flags["trace"].split(",")
    )
    return {
        "environment": describe(),
        "flags": flags,
        "machine": msgspec.to_builtins(setting.machine),
        "slo": asdict(setting.objective),
        "short_tokens": SHORT_TOKENS,
    }
