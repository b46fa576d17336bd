"""Simulated runs as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pla_serve.simulator.report import ByClass, RunReport

NOTHING = "-"
TIMES = ("short\nP50", "\nP90", "\nP99", "long\nP50", "\nP90", "\nP99", "all\nmean")
TOKENS = tuple(
    f"{name}\n{rank}"
    for first in ("short", "long")
    for name, rank in ((first, "P50"), ("", "P99"), ("pause", "P50"), ("", "most"))
)
TIERS = (
    *("tier", "asked", "re-\nfused", "kept"),
    *("TTFT\nP50", "\nP99", "ITL\nP50", "\nP99", "pause\nmost"),
)
REST = ("most\nwait", "short\nlate", "long\nlate", "\nbusy")


def tables(runs: Sequence[RunReport]) -> RenderableType:
    """Make a table for each trace and load, with a line for each policy.

    *Wait* is the TTFT less the time alone; *late* is the share of requests that missed the SLO.
    Where answers decode, a second table has the time between tokens, the longest *pause* of each
    answer, and the share of requests that *kept* the deadlines of all their tokens. With tiers, a
    last table has the same by tier, *kept* by its own targets, and who was *refused*.
    """
    parts: list[RenderableType] = []
    for _, group in groupby(runs, key=lambda run: (run.trace, run.load)):
        members = list(group)
        parts += [
            Text(f"{title(members[0])}: TTFT in seconds", style="bold"),
            _table(members),
            *_token_parts(members),
            *_tier_parts(members),
            Text(_note(members[0]) + "\n", style="dim"),
        ]
    return Group(*parts)


def title(run: RunReport) -> str:
    """Return the title of a table: trace, load and machine of its runs."""
    load = f"load {run.load:g}" if run.load is not None else f"{run.clients} clients"
    instances = f"{run.instances} x " if run.instances > 1 else ""
    return f"{run.trace}, {load}, {instances}{run.machine}"


def _table(runs: Sequence[RunReport]) -> Table:
    table = _empty_table(TIMES + REST)
    first = runs[0]
    table.add_row("idle", *_times(first.idle_ttft_s), *(NOTHING for _ in REST), style="dim")
    for run in runs:
        table.add_row(
            run.policy.replace(":", "\n  "),
            *_times(run.ttft_s),
            _seconds(run.wait_longest_s),
            _share(run.slo_violation.short),
            _share(run.slo_violation.long),
            f"{run.utilisation:.0%}",
        )
    return table


def _token_parts(runs: Sequence[RunReport]) -> list[RenderableType]:
    if runs[0].itl_s is None:
        return []
    table = _empty_table((*TOKENS, "short\nkept", "long\nkept"))
    alone = runs[0].idle_itl_s
    if alone is not None:
        cells = [c for t in (alone.short, alone.long) for c in (_seconds(t.p50), *[NOTHING] * 3)]
        table.add_row("idle", *cells, NOTHING, NOTHING, style="dim")
    for run in runs:
        table.add_row(
            run.policy.replace(":", "\n  "),
            *_token_times(run),
            _share(run.attainment.short),
            _share(run.attainment.long),
        )
    return [Text("Time between tokens in seconds", style="bold"), table]


def _tier_parts(runs: Sequence[RunReport]) -> list[RenderableType]:
    if not runs[0].tiers:
        return []
    table = _empty_table(TIERS)
    for run in runs:
        for number, tier in enumerate(run.tiers):
            itl, pause = tier.itl_s, tier.pause_s
            table.add_row(
                run.policy.replace(":", "\n  ") if number == 0 else "",
                tier.tier.partition(":")[0],
                f"{tier.requests:,}",
                _share(tier.refused / tier.requests if tier.requests else None),
                _share(tier.attainment),
                *(_seconds(value) for value in (tier.ttft_s.p50, tier.ttft_s.p99)),
                *(_seconds(value) for value in ((itl.p50, itl.p99) if itl else (None, None))),
                _seconds(pause.max if pause else None),
            )
    return [Text("By tier: first tokens and times between tokens in seconds", style="bold"), table]


def _token_times(run: RunReport) -> list[str]:
    if run.itl_s is None or run.pause_s is None:
        return [NOTHING] * len(TOKENS)
    pairs = ((run.itl_s.short, run.pause_s.short), (run.itl_s.long, run.pause_s.long))
    values = [v for itl, pause in pairs for v in (itl.p50, itl.p99, pause.p50, pause.max)]
    return [_seconds(value) for value in values]


def _empty_table(heads: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    table.add_column("", min_width=12, overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _note(run: RunReport) -> str:
    counts = run.ttft_s
    text = (
        f"{run.requests:,} requests ({counts.short.count:,} short), "
        f"{run.cached_tokens / run.prompt_tokens:.0%} of prompt tokens cached, "
        f"{run.throughput_tokens_per_s:,.0f} others a second; {run.arrivals}"
    )
    if run.load is not None and run.offered_load is not None and run.offered_load < 0.9 * run.load:
        text += (
            f"; over all arrivals the load is {run.offered_load:.2f}, because sessions go on after "
            "the last one has started"
        )
    return text


def _times(times: ByClass) -> list[str]:
    short, long = times.short, times.long
    values = (short.p50, short.p90, short.p99, long.p50, long.p90, long.p99, times.all.mean)
    return [_seconds(value) for value in values]


def _seconds(value: float | None) -> str:
    """Three figures or so: 0.012, 1.23, 45.6, 1,234."""
    if value is None:
        return NOTHING
    if value < 1:
        return f"{value:.3f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1%}"
