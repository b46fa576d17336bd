"""What the flags of ``pla-serve simulate`` mean: a sweep, run with a progress bar and reported."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pla_serve.environment import describe, usable_cores
from pla_serve.simulator.machine import Machine, load_machine
from pla_serve.simulator.parallel import in_order
from pla_serve.simulator.report import RunReport, run_and_report, save
from pla_serve.simulator.run import SHORT_TOKENS
from pla_serve.simulator.setting import DecodeMode, FleetSetting, Objective, Setting
from pla_serve.simulator.sweep import Sweep
from pla_serve.simulator.table import tables
from pla_serve.traces.load import Trace, load_trace

LONGEST_INPUT = 131_072
"""Tokens; what the models of the machine files accept."""
INTERRUPTED = 130
"""Exit code, as shells know it."""


@dataclass(frozen=True, slots=True)
class Flags:
    """As given; None where a flag was not."""

    trace: str
    policy: str
    load: str | None
    seed: int
    requests: int | None
    max_input_tokens: int | None
    machine: str
    mode: DecodeMode
    preemption: bool
    kv_tokens: str | None
    clients: int | None
    wait_for_answers: bool
    token_seconds: float | None
    max_pause: float | None
    instances: int
    decode_instances: int
    routing: str | None
    short_instances: int
    pool_controller: Literal["pressure", "balance"] | None
    fetch_kv: bool
    fail_every: float | None
    down_seconds: float | None
    slo_seconds: float
    slo_stretch: float
    json: Path | None
    plot: Path | None
    jobs: int | None


def execute(flags: Flags) -> int:
    """Run, show, save; returns the exit code. What is complete at Ctrl-C is reported.

    Raises:
        ValueError: flags that make no sense, or a trace or machine that cannot be read.
        OSError: a result cannot be written.
    """
    console, status = Console(), Console(stderr=True)
    setting = setting_of(flags)
    for path in (flags.json, flags.plot):
        if path is not None and path.is_dir():
            raise ValueError(f"{path} is a folder; give a file name")
    sweep = sweep_of(flags, setting, status)
    runs: list[RunReport] = []
    interrupted = False
    try:
        _run(sweep, flags.jobs or usable_cores(), status, runs)
    except KeyboardInterrupt:
        interrupted = True
        status.print(f"interrupted after {len(runs)} of {len(sweep)} runs", style="yellow")
    if runs:
        console.print(tables(runs))
    if runs and flags.json is not None:
        save(flags.json, runs, _about(flags, setting), interrupted=interrupted)
        status.print(f"saved {flags.json}", style="dim", highlight=False)
    if runs and flags.plot is not None:
        from pla_serve.simulator.plot import draw

        draw(runs, flags.plot)
        status.print(f"saved {flags.plot}", style="dim", highlight=False)
    return INTERRUPTED if interrupted else 0


def setting_of(flags: Flags) -> Setting:
    """Raises:
    ValueError: flags that do not go together.
    """
    machine = load_machine(flags.machine)
    if flags.down_seconds is not None and flags.fail_every is None:
        raise ValueError("--down-seconds needs --fail-every")
    fleet = FleetSetting(
        instances=flags.instances,
        decode_instances=flags.decode_instances,
        routing=flags.routing,
        short_instances=flags.short_instances,
        controller=flags.pool_controller,
        fail_every=flags.fail_every,
        down_seconds=30.0 if flags.down_seconds is None else flags.down_seconds,
        fetch_kv=flags.fetch_kv,
    )
    return Setting(
        machine=machine,
        fleet=fleet,
        mode=flags.mode,
        seed=flags.seed,
        preemption=flags.preemption,
        kv_tokens=_kv_tokens(flags.kv_tokens, machine),
        clients=flags.clients,
        wait_for_answers=flags.wait_for_answers,
        token_seconds=flags.token_seconds,
        max_pause=600.0 if flags.max_pause is None else flags.max_pause,
        objective=Objective(flags.slo_seconds, flags.slo_stretch),
    )


def sweep_of(flags: Flags, setting: Setting, status: Console) -> Sweep:
    """Reads the traces.

    Raises:
        ValueError: a trace cannot be read, or there is nothing to run.
    """
    loads = _loads(flags)
    specs = _split("--trace", flags.trace)
    with status.status("reading traces"):
        traces = tuple(_trace(spec, flags, setting, status) for spec in specs)
    if flags.max_pause is not None and not any(trace.recorded for trace in traces):
        raise ValueError("--max-pause is for traces whose sessions have clocks of their own")
    return Sweep(traces, tuple(_split("--policy", flags.policy)), loads, setting)


def _trace(spec: str, flags: Flags, setting: Setting, status: Console) -> Trace:
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


def _loads(flags: Flags) -> tuple[float, ...]:
    if flags.load is None:
        return () if flags.clients is not None else (0.7,)
    try:
        return tuple(float(part) for part in _split("--load", flags.load))
    except ValueError as error:
        raise ValueError(f"--load takes numbers such as 0.7,0.9: {error}") from None


def _kv_tokens(text: str | None, machine: Machine) -> int | None:
    if text is None or text == "machine":
        return None if text is None else machine.kv_tokens
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--kv-tokens takes a whole number or 'machine', not {text!r}") from None


def _run(sweep: Sweep, jobs: int, status: Console, runs: list[RunReport]) -> None:
    """Fills ``runs``."""
    bar = Progress(
        TextColumn("{task.completed:.0f} of {task.total:.0f} runs"),
        BarColumn(bar_width=32),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=status,
        refresh_per_second=4,
        disable=not status.is_terminal,
        transient=True,
    )
    sizes = [len(trace.rows) for trace in sweep.traces]
    each = len(sweep) // len(sizes)
    task = bar.add_task("", total=len(sweep))
    shares: dict[int, float] = {}

    def heard(number: int, done: int) -> None:
        shares[number] = min(1.0, done / sizes[number // each])
        bar.update(task, completed=sum(shares.values()))

    with bar:
        results = in_order(run_and_report, sweep.specs(), min(jobs, len(sweep)), heard)
        try:
            for number, run in enumerate(results):
                runs.append(run)
                shares[number] = 1.0
                bar.update(task, completed=sum(shares.values()))
        finally:
            results.close()


def _about(flags: Flags, setting: Setting) -> dict[str, object]:
    """What the numbers came from."""
    given = asdict(flags)
    for name in ("json", "plot", "jobs"):
        del given[name]
    given["trace"] = ",".join(
        Path(part).name if part.startswith(("/", "~")) else part for part in flags.trace.split(",")
    )
    return {
        "environment": describe(),
        "flags": given,
        "machine": msgspec.to_builtins(setting.machine),
        "slo": asdict(setting.objective),
        "short_tokens": SHORT_TOKENS,
    }
