"""Progress of runs on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from pla_serve.bench.load import Record
from pla_serve.bench.report import Objectives
from pla_serve.bench.workload import BenchWorkload

REFRESH = 4
"""Redraws a second; each takes the client about a millisecond."""


class RunObserver:
    """Counts the requests of one run, and shows the counts as a line of text."""

    def __init__(self, objectives: Objectives) -> None:
        self._objectives = objectives
        self.on_finish: Callable[[int], None] = lambda done: None
        """Callback, called with the number of requests that have ended."""
        self.out = 0
        self.done = 0
        self.failed = 0
        self._short_ttfts: list[float] = []

    def sent(self, record: Record) -> None:
        self.out += 1

    def finished(self, record: Record) -> None:
        self.done += 1
        self.failed += not record.ok
        if record.ok and record.ttft is not None and self._objectives.is_short(record):
            self._short_ttfts.append(record.ttft)
        self.on_finish(self.done)

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.out} sent, {self.done} answered{failed}{self._ttft()}"

    def _ttft(self) -> str:
        if not self._short_ttfts:
            return ""
        return f", short TTFT P90 {np.percentile(self._short_ttfts, 90):.2f} s"


class _Counts(ProgressColumn):
    """Column with the observer's text, which is read at each redraw and not for each request."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["observer"]))


class ProgressView:
    """Shows a bar for every run, one below the other.

    If standard output is no terminal, it prints a line when a run starts instead.
    """

    def __init__(self, console: Console, objectives: Objectives) -> None:
        self._console = console
        self._objectives = objectives
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            _Counts(),
            console=console,
            refresh_per_second=REFRESH,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> ProgressView:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def observe(self, title: str, workload: BenchWorkload) -> RunObserver:
        observer = RunObserver(self._objectives)
        for task in self._progress.tasks:
            self._progress.stop_task(task.id)
        bar = self._progress.add_task(title, total=workload.requests, observer=observer)
        observer.on_finish = lambda done: self._progress.update(bar, completed=done)
        if not self._console.is_terminal:
            seconds = workload.sessions[-1].start
            self.tell(f"{title}: {workload.requests} requests over {seconds:.0f} s")
        return observer

    def tell(self, message: str) -> None:
        self._console.print(message, style="dim", highlight=False)
