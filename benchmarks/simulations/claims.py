"""What must hold of length-aware prefill scheduling, checked against a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from simulations.knobs import FLOW, OURS, PLAIN, STIFF, as_published, textbook, unbounded
from simulations.rows import Row, Runs

TIMES_BELOW = 5.0
TO_IDLE = 3.0
TO_MEAN = 1.02
TO_HRRN = 1.1
TO_MAKESPAN = 1.02
KEEPS_UP = 1.02
"""Makespan of a tuned baseline to that of fcfs as it comes, at most."""
SERVES_LONGS = 1.5
"""Long P99 of a tuned baseline to the least that its knobs reach, at most."""

Read = Callable[[Row], float]


@dataclass(frozen=True, slots=True)
class Check:
    """A bound on one workload."""

    claim: str
    label: str
    load: float
    value: float
    bound: float
    at_least: bool
    rival: str = ""
    """The baseline, with its knobs, that the value is measured against."""
    ours: float | None = None
    theirs: float | None = None
    wait_longest: float | None = None
    """Of the rival, where its longest wait is what a low mean costs; seconds."""
    wait_longest_ours: float | None = None

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def tuned(runs: Runs, name: str, among: Callable[[str], bool] = bool) -> Row:
    """The knobs of a baseline with the lowest short P90 among those that keep up.

    To keep up is to lose no throughput (`KEEPS_UP`) and to serve longs about as well as this
    baseline can (`SERVES_LONGS`). Where no knobs do both, throughput alone counts. Knobs are
    chosen for each workload anew, which an operator could not do.

    Args:
        among: which knobs to choose from.
    """
    rows = [row for row in runs.rows if row.name == name and among(row.policy)]
    plain = runs.row(PLAIN)
    able = [row for row in rows if row.makespan <= KEEPS_UP * plain.makespan] or rows
    least = min(row.long_p99 for row in able)
    fair = [row for row in able if row.long_p99 <= SERVES_LONGS * least]
    return min(fair, key=lambda row: row.short_p90)


def check_all(workloads: Iterable[Runs]) -> list[Check]:
    """Every bound on every workload."""
    return [check for runs in workloads for check in _checks(runs)]


def _checks(runs: Runs) -> Iterator[Check]:
    yield from _shorts(runs)
    yield from _against_flow(runs)
    yield from _means(runs)
    yield from _rest(runs)


def _shorts(runs: Runs) -> Iterator[Check]:
    ours = runs.row(OURS)
    best = [tuned(runs, name) for name in STIFF]
    published = [tuned(runs, name, as_published) for name in STIFF]
    every = [row for row in runs.rows if row.name in STIFF]
    groups = {
        "tuned baseline": best,
        "tuned, laps by raw length": published,
        "any knobs, whatever the cost": every,
    }
    for rank, read in (("P90", _p90), ("P99", _p99)):
        for which, rows in groups.items():
            rival = min(rows, key=read)
            yield _ratio(
                f"short {rank}, {which} / ours",
                runs,
                (read(rival), read(ours)),
                TIMES_BELOW,
                rival,
                at_least=True,
            )
    for rank, value, idle in (
        ("P90", ours.short_p90, runs.idle_short_p90),
        ("P99", ours.short_p99, runs.idle_short_p99),
    ):
        yield Check(f"short {rank} / idle", runs.label, runs.load, value / idle, TO_IDLE, False)


def _against_flow(runs: Runs) -> Iterator[Check]:
    """As it comes, tuned, and whatever its knobs reach."""
    ours = runs.row(OURS)
    rows = [row for row in runs.rows if row.name == FLOW]
    for which, rival in (("default", runs.row(FLOW)), ("tuned", tuned(runs, FLOW))):
        for rank, read in (("P90", _p90), ("P99", _p99)):
            name = f"short {rank} / {FLOW} ({which})"
            yield _ratio(name, runs, (read(ours), read(rival)), 1.0, rival)
        value = min(ours.mean / rival.mean, ours.long_p99 / rival.long_p99)
        name = f"mean or long P99 / {FLOW} ({which})"
        yield Check(name, runs.label, runs.load, value, 1.0, False, rival.policy)
    rival = min(rows, key=_p90)
    yield _ratio(f"short P90 / {FLOW} (any)", runs, (ours.short_p90, rival.short_p90), 1.0, rival)


def _means(runs: Runs) -> Iterator[Check]:
    """A low mean is cheap if some requests may wait for ever, so that is told apart."""
    ours = runs.row(OURS)
    others = [row for row in runs.rows if row.name != OURS]
    groups = {
        "best baseline": others,
        "best but textbook srpt": [row for row in others if not textbook(row.policy)],
        "best within the bound on long P99": [
            row for row in others if row.long_p99 <= TO_HRRN * _best_hrrn(runs).long_p99
        ],
        "best whose order starves none": [row for row in others if not unbounded(row.policy)],
    }
    for which, rows in groups.items():
        rival = min(rows, key=lambda row: row.mean)
        yield _ratio(f"mean / {which}", runs, (ours.mean, rival.mean), TO_MEAN, rival, waits=ours)


def _rest(runs: Runs) -> Iterator[Check]:
    ours, plain = runs.row(OURS), runs.row(PLAIN)
    for which, rival in (("tuned", tuned(runs, "hrrn")), ("its best", _best_hrrn(runs))):
        name = f"long P99 / hrrn ({which})"
        yield _ratio(name, runs, (ours.long_p99, rival.long_p99), TO_HRRN, rival)
    yield _ratio("makespan / fcfs", runs, (ours.makespan, plain.makespan), TO_MAKESPAN, plain)


def _best_hrrn(runs: Runs) -> Row:
    """The knobs with the lowest long P99."""
    return min((row for row in runs.rows if row.name == "hrrn"), key=_long_p99)


def stiff_checks(runs: Runs, ours: Row, slack: float = 1.02) -> list[Check]:
    """Without preemption: shorts at equal or better long P99, and longs at equal or better shorts.

    Args:
        runs: all that cannot interrupt a prefill.
        slack: what counts as equal.
    """
    found = []
    pairs: tuple[tuple[str, Read, Read], ...] = (
        ("short P90, best at equal long P99 / ours", _p90, _long_p99),
        ("long P99, best at equal short P90 / ours", _long_p99, _p90),
    )
    for claim, read, equal in pairs:
        rivals = [
            row for row in runs.rows if row.name in STIFF and equal(row) <= slack * equal(ours)
        ]
        if rivals:
            rival = min(rivals, key=read)
            found.append(_ratio(claim, runs, (read(rival), read(ours)), 1.0, rival, at_least=True))
    return found


def _ratio(
    claim: str,
    runs: Runs,
    values: tuple[float, float],
    bound: float,
    rival: Row,
    *,
    at_least: bool = False,
    waits: Row | None = None,
) -> Check:
    """The first of two values over the second; ours is the first, or the second if ``at_least``."""
    first, second = values
    ours, theirs = (second, first) if at_least else (first, second)
    return Check(
        claim,
        runs.label,
        runs.load,
        first / second,
        bound,
        at_least,
        rival.policy,
        ours,
        theirs,
        rival.wait_longest if waits else None,
        waits.wait_longest if waits else None,
    )


def _p90(row: Row) -> float:
    return row.short_p90


def _p99(row: Row) -> float:
    return row.short_p99


def _long_p99(row: Row) -> float:
    return row.long_p99
