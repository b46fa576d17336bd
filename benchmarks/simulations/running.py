"""Runs on virtual time, with progress."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pla_serve.simulator.parallel import in_order
from pla_serve.simulator.report import RunReport, run_and_report
from pla_serve.simulator.setting import Setting
from pla_serve.simulator.sweep import Sweep
from pla_serve.traces.load import Trace


def run(
    trace: Trace,
    load: float,
    policies: Sequence[str],
    setting: Setting,
    console: Console,
    *,
    jobs: int = 1,
) -> list[RunReport]:
    """Every policy on the same arrivals."""
    sweep = Sweep((trace,), tuple(policies), (load,), setting)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed} of {task.total} runs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    reports: list[RunReport] = []
    with bar:
        task = bar.add_task(f"{_short(trace.name)} at {load:g}", total=len(sweep))
        results = in_order(run_and_report, sweep.specs(), min(jobs, len(sweep)), _silent)
        for report in results:
            reports.append(report)
            bar.advance(task)
    console.print(f"{_short(trace.name)} at {load:g}: {len(reports)} runs", highlight=False)
    return reports


def _silent(number: int, done: int) -> None:
    """Within a run no progress is shown; it takes a second."""


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:37]}..."
