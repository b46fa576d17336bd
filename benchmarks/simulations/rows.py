"""The numbers of many runs, and the compact file that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from pla_serve.environment import describe
from pla_serve.simulator.report import RunReport

DIGITS = 5
"""Significant ones that are kept."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One run; times are seconds of TTFT. An array in the file, so that it is a line."""

    policy: str
    short_p50: float
    short_p90: float
    short_p99: float
    short_max: float
    long_p50: float
    long_p90: float
    long_p99: float
    long_max: float
    mean: float
    """Over all requests."""
    wait_longest: float
    """The largest TTFT less that request's time alone."""
    makespan: float
    utilisation: float

    @property
    def name(self) -> str:
        """The policy without its knobs."""
        return self.policy.partition(":")[0]


class Runs(msgspec.Struct):
    """All runs of one trace at one load: the same arrivals."""

    label: str
    trace: str
    load: float
    offered_load: float
    """Between first and last arrival; less than ``load`` where sessions end after the last start"""
    requests: int
    shorts: int
    longs: int
    idle_short_p90: float
    idle_short_p99: float
    """Each short alone on an idle machine."""
    idle_mean: float
    arrivals: str
    rows: list[Row]

    @property
    def key(self) -> tuple[str, float]:
        return self.label, self.load

    def same_work(self, other: Runs) -> bool:
        """Whether rows of both may be compared."""
        mine, theirs = (
            {k: v for k, v in msgspec.structs.asdict(runs).items() if k != "rows"}
            for runs in (self, other)
        )
        return mine == theirs

    def row(self, policy: str) -> Row:
        """Raises:
        ValueError: there is none.
        """
        for row in self.rows:
            if row.policy == policy:
                return row
        raise ValueError(f"no run of {policy} on {self.label} at {self.load}: run sweep first")


class Results(msgspec.Struct):
    """A whole sweep."""

    recorded: list[dict[str, Any]]
    """What was run when, where and with which versions: ``policies`` and `describe`."""
    workloads: list[Runs]
    columns: tuple[str, ...] = Row.__struct_fields__

    def renew(self, fresh: Runs) -> None:
        """Take in rows, in place of those of the same policies.

        Raises:
            ValueError: the arrivals differ from those of the rows that are there.
        """
        for number, runs in enumerate(self.workloads):
            if runs.key != fresh.key:
                continue
            if not runs.same_work(fresh):
                raise ValueError(
                    f"{fresh.label} at {fresh.load} is not the workload of the recorded runs: "
                    "sweep without --only"
                )
            names = {row.name for row in fresh.rows}
            kept = [row for row in runs.rows if row.name not in names]
            self.workloads[number] = msgspec.structs.replace(fresh, rows=[*kept, *fresh.rows])
            return
        self.workloads.append(fresh)

    def note(self, policies: Sequence[str]) -> None:
        """These were run just now."""
        for record in self.recorded:
            record["policies"] = [name for name in record["policies"] if name not in policies]
        old = [record for record in self.recorded if record["policies"]]
        self.recorded = [*old, {"policies": list(policies), **describe()}]


def runs_of(label: str, reports: Sequence[RunReport]) -> Runs:
    """Reports of one workload."""
    first = reports[0]
    idle = first.idle_ttft_s
    return Runs(
        label=label,
        trace=first.trace,
        load=first.load or 0.0,
        offered_load=_rounded(first.offered_load),
        requests=first.requests,
        shorts=idle.short.count,
        longs=idle.long.count,
        idle_short_p90=_rounded(idle.short.p90),
        idle_short_p99=_rounded(idle.short.p99),
        idle_mean=_rounded(idle.all.mean),
        arrivals=first.arrivals,
        rows=[row_of(report) for report in reports],
    )


def row_of(report: RunReport) -> Row:
    """A report in few numbers."""
    short, long = report.ttft_s.short, report.ttft_s.long
    numbers = (
        *(short.p50, short.p90, short.p99, short.max),
        *(long.p50, long.p90, long.p99, long.max),
        *(report.ttft_s.all.mean, report.wait_longest_s),
        *(report.makespan_s, report.utilisation),
    )
    return Row(report.policy, *(_rounded(number) for number in numbers))


def named(row: Row) -> dict[str, Any]:
    """A row with the names of its numbers."""
    return msgspec.structs.asdict(row)


def save(results: Results, path: Path) -> None:
    """One line a run."""
    body = msgspec.to_builtins(results)
    workloads = body.pop("workloads")
    lines = [f"{_text(body)[:-1]},", '"workloads": [']
    for number, runs in enumerate(workloads):
        rows = runs.pop("rows")
        lines.append(f'{_text(runs)[:-1]}, "rows": [')
        lines += [f"{_text(row)}," for row in rows[:-1]]
        lines.append(f"{_text(rows[-1])}]}}{',' if number + 1 < len(workloads) else ''}")
    lines.append("]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def load(path: Path) -> Results:
    """Raises:
    ValueError: there is no such file, or it is not a sweep.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} holds no sweep ({error}): run sweep first") from None


def save_plain(path: Path, content: object) -> None:
    """Any other result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _rounded(value: float | None) -> float:
    return float(f"{value or 0.0:.{DIGITS}g}")
