"""Picture of simulated runs: short P90 and long P99 by policy and load, a row for each trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pla_serve.simulator.report import ByClass, RunReport

INK, FAINT = "#222222", "#8a8a8a"
SHORT_COLORS = ("#7fb7cf", "#0f6b8f", "#083c52")
LONG_COLORS = ("#e6ab85", "#c2571a", "#6e2f0b")
"""Colors of the dots, from light to heavy load."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """A column of the picture."""

    title: str
    colors: tuple[str, ...]
    read: Callable[[ByClass], float | None]


PANELS = (
    _Panel("short prompts, TTFT P90", SHORT_COLORS, lambda times: times.short.p90),
    _Panel("long prompts, TTFT P99", LONG_COLORS, lambda times: times.long.p99),
)


def draw(runs: Sequence[RunReport], path: Path) -> None:
    """Write a PNG, and make its folder if it is missing.

    The dashed line is the same percentile on an idle machine.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    traces = list(dict.fromkeys(run.trace for run in runs))
    policies = list(dict.fromkeys(run.policy for run in runs))
    height = len(traces) * (0.9 + 0.42 * len(policies)) + 0.7
    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure, grid = pyplot.subplots(
            len(traces), 2, figsize=(10, height), dpi=150, layout="constrained", squeeze=False
        )
        for row, trace in enumerate(traces):
            members = [run for run in runs if run.trace == trace]
            for column, panel in enumerate(PANELS):
                _panel(grid[row][column], panel, members, policies)
            grid[row][0].set_title(f"{trace}\n{PANELS[0].title}", **_title_style())
            grid[row][1].set_title(PANELS[1].title, **_title_style())
            grid[row][1].set_yticklabels([])
        first = runs[0]
        figure.suptitle(
            f"Simulated, {first.instances} x {first.machine}, mode {first.mode}",
            x=0.01,
            ha="left",
            color=FAINT,
            fontsize=9,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)


def _title_style() -> dict[str, Any]:
    return {"loc": "left", "fontsize": 10, "fontweight": "bold", "color": INK}


def _panel(axes: Any, panel: _Panel, runs: Sequence[RunReport], policies: Sequence[str]) -> None:
    loads = list(dict.fromkeys(run.load for run in runs))
    for run in runs:
        value = panel.read(run.ttft_s)
        if value is None:
            continue
        place = loads.index(run.load)
        color = panel.colors[_shade(place, len(loads), len(panel.colors))]
        y = policies.index(run.policy) + (place - (len(loads) - 1) / 2) * 0.7 / max(1, len(loads))
        axes.plot([value], [y], "o", color=color, markersize=6)
        label = (
            seconds_label(value) if run.load is None else f"{seconds_label(value)}  at {run.load:g}"
        )
        axes.annotate(
            label,
            (value, y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=color,
        )
    idle = [found for run in runs if (found := panel.read(run.idle_ttft_s)) is not None]
    if idle:
        axes.axvline(max(idle), color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            f"idle {seconds_label(max(idle))}",
            (max(idle), 0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            color=FAINT,
            fontsize=7,
        )
    _frame(axes, policies)


def _shade(place: int, loads: int, colors: int) -> int:
    return 1 if loads == 1 else round(place / (loads - 1) * (colors - 1))


def _frame(axes: Any, policies: Sequence[str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_ylim(len(policies) - 0.45, -0.55)
    axes.set_yticks(range(len(policies)), [policy.replace(":", "\n") for policy in policies])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_label(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.1, high * (high / low) ** 0.18)  # room for the last label
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    plain_frame(axes)


def plain_frame(axes: Any) -> None:
    """Leave only the bottom line of a frame, and put the grid behind everything."""
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cccccc")


def seconds_label(value: float) -> str:
    """Write seconds with two digits, in ms below a tenth of a second."""
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
