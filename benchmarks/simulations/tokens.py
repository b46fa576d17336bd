"""Streams beside long prompts on virtual time: gaps, pauses, and what they cost first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pla_serve.simulator.machine import load_machine
from pla_serve.simulator.report import RunReport, run_and_report
from pla_serve.simulator.setting import DecodeMode, FleetSetting, Setting
from pla_serve.simulator.sweep import Sweep
from pla_serve.traces.load import load_trace
from simulations import workloads
from simulations.running import run

OURS = "length-aware"
CHUNKS = (512, 2048)
POLICIES = (OURS, "fcfs", *(f"fcfs:max-batch-tokens={tokens}" for tokens in CHUNKS), "hrrn")
MACHINES = ("h200-qwen2.5-32b", "h200-qwen2.5-7b")
MODES: tuple[DecodeMode, ...] = ("mix", "pd-spatial")
CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128)
REQUESTS = 600
"""First requests of each trace."""


@dataclass(frozen=True, slots=True)
class Bound:
    """What is aimed for, and what came of it."""

    what: str
    value: float | None
    most: float

    @property
    def holds(self) -> bool:
        return self.value is not None and self.value <= self.most


def measure(traces: Path, console: Console, jobs: int) -> list[dict[str, Any]]:
    """Every policy on every trace, load, machine and mode; one row for each run."""
    rows = []
    for name in MACHINES:
        for mode in MODES if name == MACHINES[0] else MODES[:1]:
            fleet = FleetSetting(decode_instances=1 if mode == "pd-spatial" else 0)
            setting = Setting(load_machine(name), fleet, mode=mode, seed=workloads.SEED)
            policies = POLICIES if mode == "mix" else (OURS, "fcfs")
            for source in workloads.SOURCES:
                trace = workloads.read(source, traces, REQUESTS)
                for load in workloads.LOADS:
                    found = run(trace, load, policies, setting, console, jobs=jobs)
                    rows += [row(source.label, report) for report in found]
    return rows


def closed(console: Console) -> list[dict[str, Any]]:
    """Clients that send the next request with the first token of the last: chat, 32B."""
    found = []
    for clients in CLIENTS:
        count = max(400, min(4000, 100 * clients))
        trace = load_trace(f"gen:chat:requests={count}", seed=workloads.SEED)
        setting = Setting(
            load_machine(MACHINES[0]), clients=clients, token_seconds=0.0, seed=workloads.SEED
        )
        for spec in Sweep((trace,), (OURS, "fcfs", "hrrn"), (), setting).specs():
            report = run_and_report(spec, lambda done: None)
            found.append(
                {
                    "clients": clients,
                    "policy": report.policy,
                    "requests_per_s": report.requests / report.makespan_s,
                    "short_p90": report.ttft_s.short.p90,
                    "mean": report.ttft_s.all.mean,
                }
            )
        console.print(f"{clients} clients", highlight=False)
    return found


def row(label: str, report: RunReport) -> dict[str, Any]:
    """The figures of one run that matter here; seconds."""
    itl, pause, alone = report.itl_s, report.pause_s, report.idle_itl_s
    assert itl is not None
    assert pause is not None
    assert alone is not None
    return {
        "trace": label,
        "load": report.load,
        "machine": report.machine,
        "mode": report.mode,
        "policy": report.policy,
        "short_p90": report.ttft_s.short.p90,
        "short_p90_idle": report.idle_ttft_s.short.p90,
        "long_p99": report.ttft_s.long.p99,
        "mean": report.ttft_s.all.mean,
        "throughput": report.throughput_tokens_per_s,
        "itl_p50": itl.all.p50,
        "itl_p99": itl.all.p99,
        "itl_idle": alone.all.p50,
        "pause_p50": pause.all.p50,
        "pause_p90": pause.all.p90,
        "pause_most": pause.all.max,
    }


def bounds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is aimed for in mode mix, by machine, trace and load."""
    keys = dict.fromkeys((r["machine"], r["trace"], r["load"]) for r in rows if r["mode"] == "mix")
    found = []
    for machine, trace, load in keys:
        here = [
            r
            for r in rows
            if (r["machine"], r["trace"], r["load"], r["mode"]) == (machine, trace, load, "mix")
        ]
        mine, others = here[0], here[1:]
        best = max(other["throughput"] for other in others)
        alike = [o for o in others if o["itl_p99"] <= mine["itl_p99"]]
        rival = min((o["short_p90"] for o in alike), default=None)
        checks = [
            Bound("ITL P99 over an idle step", mine["itl_p99"] / mine["itl_idle"], 2.0),
            Bound("best throughput over ours", best / mine["throughput"], 1 / 0.97),
            Bound("short P90 over idle", mine["short_p90"] / mine["short_p90_idle"], 1.5),
            Bound(
                "short P90 over that of the best with as short an ITL P99",
                None if rival is None else mine["short_p90"] / rival,
                0.2,
            ),
        ]
        about = {"machine": machine, "trace": trace, "load": load}
        found += [
            {**about, "what": c.what, "value": c.value, "most": c.most, "holds": c.holds}
            for c in checks
        ]
    return found


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """A table for each machine and mode."""
    columns = ("short_p90", "mean", "itl_p50", "itl_p99", "pause_p50", "pause_p90", "pause_most")
    for machine, mode in dict.fromkeys((r["machine"], r["mode"]) for r in rows):
        table = Table("trace", "load", "policy", *columns, title=f"{machine}, {mode}: seconds")
        for r in rows:
            if (r["machine"], r["mode"]) == (machine, mode):
                cells = [f"{r[name]:.3g}" for name in columns]
                table.add_row(r["trace"], str(r["load"]), r["policy"], *cells)
        console.print(table)
