"""Picture of an experiment: TTFT of short and long prompts under each policy, on a log scale."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pla_serve.bench.report import LONG, SHORT
from pla_serve.bench.summary import Summary

COLORS = {SHORT: "#0f6b8f", LONG: "#c2571a"}
INK, FAINT = "#222222", "#8a8a8a"
RANKS = ("p50", "p90", "p99")


def draw(summaries: Sequence[Summary], path: Path, *, title: str, subtitle: str) -> None:
    """Write a PNG. Each bar runs from P50 to P99 of a class; the dot and the number are P90."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.6 + 0.78 * len(summaries)
    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure, axes = pyplot.subplots(figsize=(8.6, height), dpi=160, layout="constrained")
        for row, summary in enumerate(summaries):
            for name, offset in ((SHORT, -0.17), (LONG, 0.17)):
                _range(axes, summary, name, row + offset)
        _idle_line(axes, summaries)
        _frame(axes, summaries)
        _heading(axes, title, subtitle)
        figure.savefig(path)
        pyplot.close(figure)


def _range(axes: Any, summary: Summary, name: str, y: float) -> None:
    low, middle, high = (summary.values.get(f"{name}_ttft_{rank}") for rank in RANKS)
    if low is None or middle is None or high is None:
        return
    color = COLORS[name]
    axes.plot([low, high], [y, y], color=color, alpha=0.35, linewidth=7, solid_capstyle="butt")
    axes.plot([middle], [y], "o", color=color, markersize=7)
    axes.annotate(
        _label(middle),
        (high, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=color,
        fontsize=9,
        fontweight="bold",
    )


def _idle_line(axes: Any, summaries: Sequence[Summary]) -> None:
    """Draw the P90 of short prompts on an idle machine, which no policy can beat."""
    known = [v for s in summaries if (v := s.values.get("idle_ttft_p90")) is not None]
    if not known:
        return
    idle = statistics.median(known)
    axes.axvline(idle, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        f"idle {_label(idle)}",
        (idle, 0),
        xycoords=("data", "axes fraction"),
        xytext=(4, 5),
        textcoords="offset points",
        color=FAINT,
        fontsize=8,
    )


def _frame(axes: Any, summaries: Sequence[Summary]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_ylim(len(summaries) - 0.4, -0.6)
    axes.set_yticks(
        range(len(summaries)), [summary.entry.replace(":", "\n") for summary in summaries]
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _label(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 1.5)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cccccc")


def _heading(axes: Any, title: str, subtitle: str) -> None:
    """Write the title, and the names of the classes in their colors in place of a legend."""
    axes.set_title(f"{title}\n", loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=8.5, color=FAINT)
    for x, name in ((0.87, SHORT), (0.95, LONG)):
        axes.text(x, 1.02, name, transform=axes.transAxes, color=COLORS[name], fontweight="bold")
    axes.set_xlabel(
        "time to first token: bar P50 to P99, dot and number P90", color=INK, fontsize=9
    )


def _label(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
