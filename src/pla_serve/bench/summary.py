"""Medians over the repetitions of each entry, and their ratios to a baseline."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from pla_serve.bench.experiment import BenchRun, ExperimentResult
from pla_serve.bench.report import ALL, LONG, SHORT, Percentiles


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians over the repetitions of one entry, in seconds and per second.

    A value is None where no request gave one, for example the TTFT of a class without requests.
    """

    entry: str
    runs: int
    values: dict[str, float | None]
    ratios: dict[str, float | None]
    """Each value divided by the baseline's."""


def summaries(outcome: ExperimentResult, baseline: str) -> list[Summary]:
    """Return a summary of each entry that ran, in the order of the runs."""
    entries = list(dict.fromkeys(run.entry for run in outcome.runs))
    values = {entry: _medians(outcome.of(entry)) for entry in entries}
    base = values.get(baseline, {})
    return [
        Summary(
            entry,
            len(outcome.of(entry)),
            values[entry],
            {name: _ratio(value, base.get(name)) for name, value in values[entry].items()},
        )
        for entry in entries
    ]


def headline(run: BenchRun) -> dict[str, float | None]:
    """Return the numbers of one run that summaries compare, by name."""
    numbers: dict[str, float | None] = {}
    for name in (SHORT, LONG, ALL):
        part = run.report.classes[name]
        for metric in ("ttft", "itl", "pause", "latency"):
            values: Percentiles | None = getattr(part, metric)
            for rank in ("p50", "p90", "p99", "mean"):
                numbers[f"{name}_{metric}_{rank}"] = getattr(values, rank) if values else None
        numbers[f"{name}_longest_pause"] = part.longest_pause
        numbers[f"{name}_slo_attainment"] = part.slo_attainment
        numbers[f"{name}_goodput"] = part.goodput
    whole = run.report.classes[ALL]
    numbers["requests_per_second"] = whole.requests_per_second
    numbers["prompt_tokens_per_second"] = whole.prompt_tokens_per_second
    numbers["output_tokens_per_second"] = whole.output_tokens_per_second
    numbers["failed"] = float(whole.requests - whole.succeeded)
    short = run.report.classes[SHORT].ttft
    if run.idle is not None:
        numbers["idle_ttft_p50"], numbers["idle_ttft_p90"] = run.idle.p50, run.idle.p90
        numbers["short_ttft_p90_over_idle"] = _ratio(short.p90 if short else None, run.idle.p90)
    return numbers


def _medians(runs: list[BenchRun]) -> dict[str, float | None]:
    columns: dict[str, list[float]] = {}
    for run in runs:
        for name, value in headline(run).items():
            columns.setdefault(name, []).extend([] if value is None else [value])
    return {name: statistics.median(values) if values else None for name, values in columns.items()}


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
