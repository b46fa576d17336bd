"""Runs a sweep with a progress bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pla_serve.simulator.parallel import in_order
from pla_serve.simulator.report import RunReport, run_and_report
from pla_serve.simulator.sweep import Sweep


def run_sweep(sweep: Sweep, jobs: int, status: Console, runs: list[RunReport]) -> None:
    """Run everything, at most ``jobs`` runs at a time, and append to ``runs`` what is complete.

    Raises:
        KeyboardInterrupt: Ctrl-C; ``runs`` has the runs that were complete.
        WorkerError: a process of a run died.
    """
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

    def on_progress(number: int, done: int) -> None:
        shares[number] = min(1.0, done / sizes[number // each])
        bar.update(task, completed=sum(shares.values()))

    with bar:
        results = in_order(run_and_report, sweep.specs(), min(jobs, len(sweep)), on_progress)
        try:
            for number, run in enumerate(results):
                runs.append(run)
                shares[number] = 1.0
                bar.update(task, completed=sum(shares.values()))
        finally:
            results.close()
