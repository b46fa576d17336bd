"""Claims on the terminal: a line a bound, a column a workload."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from simulations.claims import Check


def show(checks: Sequence[Check], console: Console) -> None:
    """All bounds, and then against whom those were missed."""
    places = list(dict.fromkeys((check.label, check.load) for check in checks))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what must hold")
    table.add_column("bound", justify="right")
    for label, load in places:
        table.add_column(f"{label}\n{load:g}", justify="right")
    for claim in dict.fromkeys(check.claim for check in checks):
        members = {(c.label, c.load): c for c in checks if c.claim == claim}
        first = next(iter(members.values()))
        bound = f"{'≥' if first.at_least else '≤'} {first.bound:g}"
        table.add_row(claim, bound, *(_cell(members.get(place)) for place in places))
    console.print(table)
    missed = [check for check in checks if not check.holds]
    console.print(f"{len(checks) - len(missed)} of {len(checks)} hold", highlight=False)
    for check in missed:
        console.print(_detail(check), style="red", highlight=False, soft_wrap=True)


def _cell(check: Check | None) -> str:
    if check is None:
        return "-"
    text = f"{check.value:.2f}" if check.value < 100 else f"{check.value:.0f}"
    return text if check.holds else f"[bold red]{text}![/]"


def _detail(check: Check) -> str:
    parts = [f"missed: {check.claim} on {check.label} at {check.load:g}: {check.value:.3g}"]
    if check.ours is not None and check.theirs is not None:
        parts.append(f"ours {check.ours:.4g} s, {check.rival} {check.theirs:.4g} s")
    if check.wait_longest is not None and check.wait_longest_ours is not None:
        parts.append(f"longest wait {check.wait_longest:.0f} s, ours {check.wait_longest_ours:.0f}")
    return "; ".join(parts)
