"""Where all requests are of one class, or one class comes in bursts, nothing may be lost."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pla_serve.simulator.report import RunReport
from pla_serve.traces.load import load_trace
from simulations.knobs import OURS, PLAIN
from simulations.running import run
from simulations.workloads import LOADS, LONGEST_INPUT, setting

KINDS = ("all-short", "all-long", "burst-short", "burst-long")
MOST = 1.02
"""Of ours to fcfs: mean and P99; and of fcfs to ours: throughput."""
NUMBERS = ("throughput", "mean", "p99")

Comparison = dict[str, Any]


def measure(seeds: int, console: Console, jobs: int, requests: int | None) -> list[Comparison]:
    """Ratios of length-aware to fcfs for each kind, load and seed, over all requests."""
    found = []
    for kind in KINDS:
        for load in LOADS:
            for seed in range(seeds):
                trace = load_trace(
                    f"gen:{kind}", seed=seed, max_input_tokens=LONGEST_INPUT, max_requests=requests
                )
                plain, ours = run(
                    trace, load, (PLAIN, OURS), setting(seed=seed), console, jobs=jobs
                )
                found.append({"kind": kind, "load": load, "seed": seed, **_compare(plain, ours)})
    return found


def _compare(plain: RunReport, ours: RunReport) -> Comparison:
    """Costs, so that more than 1 is worse than fcfs in each."""
    before, after = _costs(plain), _costs(ours)
    ratios = {name: after[name] / before[name] for name in NUMBERS}
    return {
        "requests": plain.requests,
        "fcfs": before,
        "length_aware": after,
        "ratios": ratios,
        "holds": all(ratio <= MOST for ratio in ratios.values()),
    }


def _costs(report: RunReport) -> dict[str, float]:
    """``throughput`` as seconds a token."""
    times = report.ttft_s.all
    assert times.mean is not None
    assert times.p99 is not None
    return {
        "throughput": 1 / report.throughput_tokens_per_s,
        "mean": times.mean,
        "p99": times.p99,
    }


def show(found: list[Comparison], console: Console) -> None:
    """Mean ratio over the seeds, and the worst."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="length-aware / fcfs: mean over seeds, worst seed; below 1 is better",
    )
    table.add_column("trace")
    table.add_column("load", justify="right")
    for name in ("seconds a token", "mean TTFT", "P99 TTFT"):
        table.add_column(name, justify="right")
    for kind, load in dict.fromkeys((one["kind"], one["load"]) for one in found):
        members = [one for one in found if (one["kind"], one["load"]) == (kind, load)]
        cells = []
        for name in NUMBERS:
            ratios = [one["ratios"][name] for one in members]
            text = f"{sum(ratios) / len(ratios):.3f}  {max(ratios):.3f}"
            cells.append(text if max(ratios) <= MOST else f"[bold red]{text}![/]")
        table.add_row(kind, f"{load:g}", *cells)
    console.print(table)
