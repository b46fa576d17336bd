"""Lays all requests of a trace on one clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from pla_serve.traces.arrivals import poisson
from pla_serve.traces.rows import Row, root


@dataclass(frozen=True, slots=True)
class ClockOptions:
    """Settings of the times that are drawn where a trace has none.

    Raises:
        ValueError: a field is out of range.
    """

    seed: int = 0
    session_span: float = 3600.0
    """Seconds over which the starts of sessions with clocks of their own are spread."""
    rate: float = 1.0
    """Requests a second, on average, of a trace without times."""
    think_seconds: float = 5.0
    """Mean time between two turns of a trace without times; exponential."""

    def __post_init__(self) -> None:
        if self.session_span < 0 or not self.rate > 0 or self.think_seconds < 0:
            raise ValueError("session_span and think_seconds must be >= 0, rate > 0")


def common_clock(rows: Sequence[Row]) -> bool:
    """Whether all arrivals are known and on one clock.

    Several sessions that each start at 0 have clocks of their own.
    """
    starts: dict[str, float] = {}
    for row in rows:
        if row.arrival is None:
            return False
        if row.session is not None:
            name = root(row.session)
            starts[name] = min(starts.get(name, row.arrival), row.arrival)
    return len(starts) <= 1 or any(start > 0 for start in starts.values())


def on_one_clock(rows: Sequence[Row], options: ClockOptions) -> tuple[list[Row], str]:
    """Return the rows in the order of their arrivals, the first at 0, and where these come from.

    - A common clock is kept.
    - Sessions with clocks of their own start at times drawn uniformly over ``session_span``;
      sub-agents have their session's clock.
    - Without times, sessions start as a Poisson process in the file's order, at a rate that makes
      ``rate`` requests a second; a request without a session is a session of its own. A later turn
      comes after its think time, recorded or drawn. ``think`` of the row says it, so that a replay
      can wait for the answer as well.
    """
    if any(row.arrival is None for row in rows):
        timed = _drawn(rows, options)
        words = f"Poisson, {options.rate:g} requests/s, and thought of {options.think_seconds:g} s"
    elif common_clock(rows):
        timed, words = list(rows), "the trace's arrivals"
    else:
        timed = _spread(rows, options)
        words = f"session starts uniform over {options.session_span:g} s, then the session's clock"
    timed.sort(key=lambda row: (row.arrival, row.index))
    return _from_zero(timed), words


def own_clocks(rows: Sequence[Row]) -> bool:
    """Whether all arrivals are known, but each session counts from its own start."""
    return all(row.arrival is not None for row in rows) and not common_clock(rows)


def start_sessions(
    rows: Sequence[Row], span: float, seed: int, *, max_pause: float = inf
) -> list[Row]:
    """Start the sessions at times that are drawn uniformly over ``span`` seconds.

    Args:
        rows: rows whose sessions have clocks of their own.
        span: seconds. With another span the same seed draws the same starts, stretched.
        max_pause: longest pause of a session, its sub-agents included; longer ones are cut.

    Returns:
        The rows in the order of their arrivals, the first at 0.

    Raises:
        ValueError: ``span`` or ``max_pause`` is negative.
    """
    if not (span >= 0 and max_pause >= 0):
        raise ValueError(f"span and max_pause must be at least 0, not {span} and {max_pause}")
    recorded: dict[str, float] = {}
    now: dict[str, float] = {}
    timed = []
    for row in sorted(rows, key=lambda row: (row.arrival or 0.0, row.index)):
        name = f"row{row.index}" if row.session is None else f"session{root(row.session)}"
        arrival = row.arrival or 0.0
        if name in now:
            now[name] += min(arrival - recorded[name], max_pause)
        else:
            now[name] = span * random.Random(f"{seed}/start/{name}").random()
        recorded[name] = arrival
        timed.append(replace(row, arrival=now[name]))
    timed.sort(key=lambda row: (row.arrival, row.index))
    return _from_zero(timed)


def _from_zero(rows: list[Row]) -> list[Row]:
    first = rows[0].arrival if rows else None
    if not first:
        return rows
    return [replace(row, arrival=(row.arrival or 0.0) - first) for row in rows]


def _spread(rows: Sequence[Row], options: ClockOptions) -> list[Row]:
    rng = random.Random(f"{options.seed}/spans")
    starts: dict[str, float] = {}
    timed = []
    for row in rows:
        name = f"row{row.index}" if row.session is None else f"session{root(row.session)}"
        if name not in starts:
            starts[name] = rng.uniform(0, options.session_span)
        timed.append(replace(row, arrival=starts[name] + (row.arrival or 0.0)))
    return timed


def _drawn(rows: Sequence[Row], options: ClockOptions) -> list[Row]:
    names = [f"row{row.index}" if row.session is None else f"s{row.session}" for row in rows]
    firsts = dict.fromkeys(names)
    rate = options.rate * len(firsts) / len(rows)
    times = poisson(len(firsts), rate, 1, random.Random(f"{options.seed}/starts"))
    now = dict(zip(firsts, times, strict=True))
    thoughts = random.Random(f"{options.seed}/thoughts")
    begun: set[str] = set()
    timed = []
    for name, row in zip(names, rows, strict=True):
        think = row.think
        if name in begun:
            if think is None:
                think = thoughts.expovariate(1.0) * options.think_seconds
            now[name] += think
        begun.add(name)
        timed.append(replace(row, arrival=now[name], think=think))
    return timed
