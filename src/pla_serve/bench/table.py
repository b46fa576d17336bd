"""Reports as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pla_serve.bench.experiment import Run
from pla_serve.bench.report import ALL, LONG, SHORT, ClassReport, Objectives, Percentiles
from pla_serve.bench.summary import Summary


def run_table(run: Run, objectives: Objectives) -> RenderableType:
    """One run: a line for each class."""
    table = Table(title=run.entry, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("")
    for head in ("requests", "TTFT P50", "P90", "P99", "ITL P50", "P90", "P99"):
        table.add_column(head, justify="right")
    for head in ("end to end P50", "P90", "P99", "requests/s", "SLO met", "goodput/s"):
        table.add_column(head, justify="right")
    for name in (SHORT, LONG, ALL):
        part = run.report.classes[name]
        table.add_row(_class_name(name, objectives), *_cells(part))
    return Group(table, Text("\n".join(_notes(run))), Text(""))


def comparison_table(summaries: Sequence[Summary], baseline: str) -> RenderableType:
    """One line for each entry, medians over its runs."""
    table = Table(
        title="Comparison (TTFT in seconds, medians over runs)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("")
    heads = ("short P50", "P90", "P99", "long P50", "P90", "P99", "requests/s", "tokens/s out")
    for head in (*heads, f"short P90 to {baseline}", "to idle", "SLO met"):
        table.add_column(head, justify="right")
    for summary in summaries:
        values = summary.values
        table.add_row(
            summary.entry,
            *(_seconds(values.get(f"short_ttft_{rank}")) for rank in ("p50", "p90", "p99")),
            *(_seconds(values.get(f"long_ttft_{rank}")) for rank in ("p50", "p90", "p99")),
            _number(values.get("requests_per_second")),
            _number(values.get("output_tokens_per_second")),
            _times(summary.ratios.get("short_ttft_p90")),
            _times(values.get("short_ttft_p90_over_idle")),
            _share(values.get("all_slo_attainment")),
        )
    return table


def _class_name(name: str, objectives: Objectives) -> str:
    signs = {SHORT: "≤", LONG: ">"}
    sign = signs.get(name)
    return f"{name} ({sign} {objectives.short_tokens} new)" if sign else name


def _cells(part: ClassReport) -> list[str]:
    return [
        str(part.requests),
        *_three(part.ttft),
        *_three(part.itl),
        *_three(part.latency),
        _number(part.requests_per_second),
        _share(part.slo_attainment),
        _number(part.goodput),
    ]


def _notes(run: Run) -> list[str]:
    whole = run.report.classes[ALL]
    cached = "not reported" if whole.cached_tokens is None else f"{whole.cached_tokens:,}"
    notes = [
        f"{whole.requests_per_second:.2f} requests/s, "
        f"{whole.prompt_tokens_per_second:,.0f} prompt tokens/s (cached: {cached} of "
        f"{whole.prompt_tokens:,}), {whole.output_tokens_per_second:,.1f} output tokens/s "
        f"over {run.report.seconds:.1f} s"
    ]
    if run.idle is not None:
        short = run.report.classes[SHORT].ttft
        over = f"; under load {_times(short.p90 / run.idle.p90)} of P90" if short else ""
        notes.append(
            f"idle short TTFT P50 {_seconds(run.idle.p50)} P90 {_seconds(run.idle.p90)}{over}"
        )
    if run.report.errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in run.report.errors.items())
        notes.append(f"failed: {kinds}")
    return notes + [f"warning: {warning}" for warning in run.report.warnings]


def _three(values: Percentiles | None) -> list[str]:
    if values is None:
        return ["-"] * 3
    return [_seconds(values.p50), _seconds(values.p90), _seconds(values.p99)]


def _seconds(value: float | None) -> str:
    """Three figures or so: 0.012, 1.23, 45.6."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
