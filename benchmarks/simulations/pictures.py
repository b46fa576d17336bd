"""Pictures of the sweep and of the patience curve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pla_serve.simulator.plot import plain_frame, seconds_label
from simulations.claims import tuned
from simulations.knobs import FLOW, OURS, STIFF
from simulations.patience import DEFAULT, Curve
from simulations.rows import Row, Runs
from simulations.workloads import LOADS, MACHINE

INK, FAINT, GRID = "#222222", "#8a8a8a", "#e6e6e6"
LIGHT, HEAVY = "#7fb7cf", "#0f6b8f"
"""Load 0.7 and 0.9."""
ACCENT = "#c2571a"
TRACE_COLORS = ("#0f6b8f", "#c2571a", "#4f8a3c", "#7a4fa0")
ROOM = 0.55
"""Share of the width, from the left, in which labels stand to the right of their dots."""
PATIENCE_PANELS = (
    ("mean", "mean TTFT, all"),
    ("long_p99", "long prompts, TTFT P99"),
    ("wait_longest", "longest wait"),
)
ZERO_AT = 2.0
"""Where patience 0 is drawn on a log scale."""


def short_p90(workloads: Sequence[Runs], path: Path) -> None:
    """Short P90 by policy: a panel a trace, a dot a load; baselines with their best knobs."""
    labels = list(dict.fromkeys(runs.label for runs in workloads))
    rows = -(-len(labels) // 2)
    with _figure(rows, 2, (12.5, 3.1 * rows + 0.9), path) as (figure, grid):
        for axes in grid.flat[len(labels) :]:
            axes.set_visible(False)
        for axes, label in zip(grid.flat, labels, strict=False):
            _dots(axes, [runs for runs in workloads if runs.label == label])
            axes.set_title(label, loc="left", fontsize=10, fontweight="bold", color=INK)
        figure.suptitle(
            "TTFT P90 of short prompts (at most 256 new tokens): baselines with the knobs that "
            "are best for it and still keep up, chosen for each panel and load; flowprefill and "
            "length-aware as they come\n"
            f"Simulated, one {MACHINE}.  Dashed: idle machine, and three times that.  "
            f"Light dots: load {LOADS[0]:g}, dark: {LOADS[-1]:g}",
            x=0.01,
            ha="left",
            fontsize=9,
            color=INK,
        )


def _dots(axes: Any, members: Sequence[Runs]) -> None:
    names = (*STIFF, FLOW, OURS)
    rows = {
        (runs.load, name): tuned(runs, name) if name in STIFF else runs.row(name)
        for runs in members
        for name in names
    }
    idle = max(runs.idle_short_p90 for runs in members)
    low, high = 0.7 * idle, 1.3 * max(row.short_p90 for row in rows.values())
    for (load, name), row in rows.items():
        heavy = load == LOADS[-1]
        y = names.index(name) + (0.18 if heavy else -0.18)
        axes.plot([row.short_p90], [y], "o", color=HEAVY if heavy else LIGHT, markersize=6)
        right = (
            row.short_p90 < low ** (1 - ROOM) * high**ROOM
        )  # labels point to where there is room
        axes.annotate(
            f"{seconds_label(row.short_p90)}{_knobs(row)}",
            (row.short_p90, y),
            xytext=(6 if right else -6, 0),
            textcoords="offset points",
            va="center",
            ha="left" if right else "right",
            fontsize=6.2,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            color=INK if heavy else "#6a6a6a",
        )
    for value in (idle, 3 * idle):
        axes.axvline(value, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_yticks(range(len(names)), names)
    axes.get_yticklabels()[-1].set_fontweight("bold")
    _log(axes.xaxis, axes)
    axes.set_xlim(low, high)
    axes.grid(axis="x", color=GRID, linewidth=0.8)


def _knobs(row: Row) -> str:
    """Values that differ from the defaults, in short."""
    short = {
        "max-batch-tokens": "batch",
        "long-chunk-tokens": "cap",
        "chunk-tokens": "chunk",
        "window-seconds": "window",
        "quantum-seconds": "quantum",
        "starve-seconds": "starve",
        "slo-stretch": "stretch",
        "slo-seconds": "slo",
        "boundary-tokens": "boundary",
        "classify": "",
        "order": "",
        "batch-tokens": "join",
    }
    pairs = (part.split("=") for part in row.policy.split(":")[1:])
    text = ", ".join(f"{short.get(key, key)} {value}".lstrip() for key, value in pairs)
    return f"  ({text})" if text else ""


def patience(curves: Sequence[Curve], path: Path) -> None:
    """Mean, long P99 and longest wait over the patience; solid at the heavier load."""
    labels = list(dict.fromkeys(curve["label"] for curve in curves))
    with _figure(1, len(PATIENCE_PANELS), (12, 4.1), path) as (figure, grid):
        for axes, (number, title) in zip(grid.flat, PATIENCE_PANELS, strict=True):
            for curve in curves:
                _line(axes, curve, number, TRACE_COLORS[labels.index(curve["label"])])
            _patience_axes(axes, curves)
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        for place, label in enumerate(labels):
            grid.flat[0].plot([], [], color=TRACE_COLORS[place], label=label)
        style = {"color": FAINT, "linewidth": 1.2}
        for load, dashes in ((LOADS[1], "-"), (LOADS[0], ":")):
            grid.flat[0].plot([], [], dashes, label=f"load {load:g}", **style)
        figure.legend(loc="outside lower left", ncols=6, frameon=False, fontsize=8)
        figure.suptitle(
            "length-aware: how long a long prefill may be passed by shorter ones that came later "
            f"(patience), and what it costs.  Simulated, one {MACHINE}",
            x=0.01,
            ha="left",
            fontsize=9,
            color=INK,
        )


def _line(axes: Any, curve: Curve, number: str, color: str) -> None:
    points = curve["points"]
    x = [point["patience"] or ZERO_AT for point in points]
    y = [point[number] for point in points]
    heavy = curve["load"] == LOADS[1]
    style = {"linewidth": 1.8, "marker": "o", "markersize": 3.5} if heavy else {"linewidth": 1.2}
    axes.plot(x, y, "-" if heavy else ":", color=color, **style)


def _patience_axes(axes: Any, curves: Sequence[Curve]) -> None:
    values = [point["patience"] for point in curves[0]["points"]]
    _log(axes.yaxis, axes, y=True)
    axes.set_xscale("log")
    axes.set_xticks([value or ZERO_AT for value in values], [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.axvline(DEFAULT, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        "default",
        (DEFAULT, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -8),
        textcoords="offset points",
        fontsize=7,
        color=FAINT,
    )
    axes.set_xlabel("patience (log scale, with 0 put at its left end)", color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)


@contextmanager
def _figure(
    rows: int, columns: int, size: tuple[float, float], path: Path
) -> Iterator[tuple[Any, Any]]:
    """A grid of panels, saved at the end; makes the folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure, grid = pyplot.subplots(
            rows, columns, figsize=size, dpi=150, layout="constrained", squeeze=False
        )
        yield figure, grid
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        pyplot.close(figure)


def _log(axis: Any, axes: Any, *, y: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_yscale if y else axes.set_xscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 3), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: seconds_label(value)))
    axis.set_minor_formatter(NullFormatter())
    plain_frame(axes)
