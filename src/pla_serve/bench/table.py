"""Reports as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pla_serve.bench.experiment import BenchRun
from pla_serve.bench.report import (
    ALL,
    LONG,
    SHORT,
    ClassReport,
    Objectives,
    Percentiles,
    TierFigures,
)
from pla_serve.bench.summary import Summary

NOTHING = "-"
_TIMES = {"TTFT": "ttft", "ITL": "itl", "end to end": "latency"}


def run_table(run: BenchRun, objectives: Objectives) -> RenderableType:
    """Make the table of one run, with a column for each class."""
    table = _table(run.entry, "")
    parts = [run.report.classes[name] for name in (SHORT, LONG, ALL)]
    for name in (SHORT, LONG, ALL):
        table.add_column(_class_name(name, objectives), justify="right")
    table.add_row("requests", *(f"{part.requests:,}" for part in parts))
    for title, metric in _TIMES.items():
        for rank in ("p50", "p90", "p99"):
            cells = (_seconds(_rank(getattr(part, metric), rank)) for part in parts)
            table.add_row(f"{title} {rank.upper()}, s", *cells)
    for rank in ("p50", "p90"):
        cells = (_seconds(_rank(part.pause, rank)) for part in parts)
        table.add_row(f"longest pause {rank.upper()}, s", *cells)
    table.add_row("  most, s", *(_seconds(part.longest_pause) for part in parts))
    table.add_row("requests/s", *(_number(part.requests_per_second) for part in parts))
    table.add_row("prompt tokens/s", *(_number(part.prompt_tokens_per_second) for part in parts))
    table.add_row("  of them cached", *map(_cached, parts))
    table.add_row("output tokens/s", *(_number(part.output_tokens_per_second) for part in parts))
    if objectives.given:
        table.add_row("SLO met", *(_share(part.slo_attainment) for part in parts))
        table.add_row("goodput, requests/s", *(_number(part.goodput) for part in parts))
    tiers = [_tier_table(run.report.tiers)] if run.report.tiers else []
    return Group(table, *tiers, Text("\n".join(_notes(run)) + "\n"))


def _tier_table(tiers: Mapping[str, TierFigures]) -> Table:
    table = _table("By tier", "")
    for name in ("requests", "refused", "kept", "TTFT P50, s", "P99, s", "ITL P99, s", "pause, s"):
        table.add_column(name, justify="right")
    for name, tier in tiers.items():
        table.add_row(
            name.replace(":", "\n  "),
            f"{tier.requests:,}",
            f"{tier.refused:,}",
            _share(tier.attainment),
            *(_seconds(_rank(tier.ttft, rank)) for rank in ("p50", "p99")),
            _seconds(_rank(tier.itl, "p99")),
            _seconds(tier.longest_pause),
        )
    return table


def comparison_table(summaries: Sequence[Summary], baseline: str) -> RenderableType:
    """Make the table of all entries, a line for each, with medians over its runs.

    Columns without any value are left out.
    """
    title = f"TTFT in seconds, medians over runs. x: short P90 to that of {baseline}"
    table = _table(title, "", width=12)
    columns: list[tuple[str, list[str]]] = [
        (
            f"{name if rank == 'p50' else ''}\n{rank.upper()}",
            _column(summaries, f"{name}_ttft_{rank}"),
        )
        for name in (SHORT, LONG)
        for rank in ("p50", "p90", "p99")
    ]
    columns += [
        ("\nx", [_times(summary.ratios.get("short_ttft_p90")) for summary in summaries]),
        ("x\nidle", [_times(s.values.get("short_ttft_p90_over_idle")) for s in summaries]),
        ("\nreq/s", [_number(summary.values.get("requests_per_second")) for summary in summaries]),
        ("SLO\nmet", [_share(summary.values.get("all_slo_attainment")) for summary in summaries]),
    ]
    columns = [column for column in columns if set(column[1]) != {NOTHING}]
    for head, _ in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for row, summary in enumerate(summaries):
        table.add_row(summary.entry.replace(":", "\n  "), *(cells[row] for _, cells in columns))
    return table


def _table(title: str, first: str, width: int | None = None) -> Table:
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column(first, min_width=width, overflow="fold")
    return table


def _column(summaries: Sequence[Summary], name: str) -> list[str]:
    return [_seconds(summary.values.get(name)) for summary in summaries]


def _rank(values: Percentiles | None, rank: str) -> float | None:
    return None if values is None else getattr(values, rank)


def _cached(part: ClassReport) -> str:
    if part.cached_tokens is None:
        return "not reported"
    return _share(part.cached_tokens / part.prompt_tokens) if part.prompt_tokens else NOTHING


def _class_name(name: str, objectives: Objectives) -> str:
    sign = {SHORT: "≤", LONG: ">"}.get(name)
    return f"{name} ({sign} {objectives.short_tokens} new)" if sign else name


def _notes(run: BenchRun) -> list[str]:
    report = run.report
    lag = f", send lag P99 {report.send_lag.p99 * 1000:.0f} ms" if report.send_lag else ""
    notes = [f"{report.sent} requests in {report.seconds:.1f} s{lag}"]
    if run.idle is not None:
        short = report.classes[SHORT].ttft
        over = f"; under load P90 is {_times(short.p90 / run.idle.p90)} that" if short else ""
        notes.append(
            f"idle: short TTFT P50 {_seconds(run.idle.p50)}, P90 {_seconds(run.idle.p90)}{over}"
        )
    if report.errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.errors.items())
        notes.append(f"failed: {kinds}")
    return notes + [f"warning: {warning}" for warning in report.warnings]


def _seconds(value: float | None) -> str:
    """Write seconds with about three figures: 0.012, 1.23, 45.6."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}x"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1%}"
