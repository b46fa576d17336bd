"""The bound on waiting: how much later a request may come and still go first, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pla_serve.policy.config import PolicyConfig
from simulations.knobs import OURS
from simulations.rows import named, row_of
from simulations.running import run
from simulations.workloads import LOADS, SOURCES, read, setting

VALUES = (0, 5, 20, 80, 150, 400, 1000, 4000)
DEFAULT = PolicyConfig().patience

Curve = dict[str, Any]
"""``label``, ``load`` and ``points``, each with the patience and the numbers of a run."""


def measure(folder: Path, console: Console, jobs: int, requests: int | None) -> list[Curve]:
    """Length-aware with each patience on each workload."""
    curves = []
    specs = [f"{OURS}:patience={value}" for value in VALUES]
    for source in SOURCES:
        trace = read(source, folder, requests)
        for load in LOADS:
            reports = run(trace, load, specs, setting(), console, jobs=jobs)
            points = [
                {"patience": value, **named(row_of(report))}
                for value, report in zip(VALUES, reports, strict=True)
            ]
            curves.append({"label": source.label, "load": load, "points": points})
    return curves


def show(curves: list[Curve], console: Console) -> None:
    """Mean, long P99 and longest wait."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="mean / long P99 / longest wait, s")
    table.add_column("trace")
    table.add_column("load", justify="right")
    for value in VALUES:
        table.add_column(f"{value:g}", justify="right")
    for curve in curves:
        cells = [
            f"{point['mean']:.3g}\n{point['long_p99']:.4g}\n{point['wait_longest']:.4g}"
            for point in curve["points"]
        ]
        table.add_row(curve["label"], f"{curve['load']:g}", *cells, end_section=True)
    console.print(table)
