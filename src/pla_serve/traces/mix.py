"""Mixes traces, each with a given share of all requests."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pla_serve.traces.rows import Row, TraceError


@dataclass(frozen=True, slots=True)
class Part:
    """A trace of a mixture, and its share.

    Raises:
        ValueError: the share is not positive.
    """

    name: str
    rows: Sequence[Row]
    share: float
    """Weight among the parts; the weights need not add up to 1."""

    def __post_init__(self) -> None:
        if not (self.share > 0 and math.isfinite(self.share)):
            raise ValueError(f"the share of {self.name} must be positive, not {self.share:g}")


def mix(parts: Sequence[Part], seed: int, most: int | None = None) -> list[Row]:
    """Return requests of all parts in random order, without times, and numbered anew.

    Each part gives its share of the requests, exactly up to rounding, and each request at most
    once. So the part that runs out first bounds their number, or ``most`` does. Whole sessions are
    drawn, with their turns in order; the last one is cut where the share is met. Sessions and
    blocks of different parts get different ids. `cached.recount_cached` is to be called afterwards.

    Raises:
        TraceError: the shares leave a part without any request.
    """
    weight = sum(part.share for part in parts)
    total = min(len(part.rows) * weight / part.share for part in parts)
    total = total if most is None else min(total, float(most))
    sessions: list[list[Row]] = []
    offset = 0
    for number, part in enumerate(parts):
        # Round down, but forgive errors in the last digit: 10,000 / 0.9 * 0.9 is 10,000.
        count = int(total * part.share / weight + 1e-6)
        if count < 1:
            raise TraceError(f"no request of {part.name} fits its share of {total:.0f} requests")
        rng = random.Random(f"{seed}/mix/{number}")
        drawn = _draw(part.rows, count, rng)
        sessions += [[_apart(row, number, offset) for row in session] for session in drawn]
        offset += 1 + max((run[-1] for row in part.rows for run in row.blocks or ()), default=-1)
    random.Random(f"{seed}/mix/order").shuffle(sessions)
    rows = [row for session in sessions for row in session]
    return [replace(row, index=i) for i, row in enumerate(rows)]


def _draw(rows: Sequence[Row], count: int, rng: random.Random) -> Iterator[list[Row]]:
    sessions: dict[str, list[Row]] = {}
    for row in rows:
        name = f"row{row.index}" if row.session is None else f"s{row.session}"
        sessions.setdefault(name, []).append(row)
    order = list(sessions.values())
    rng.shuffle(order)
    for session in order:
        if count <= 0:
            return
        yield session[:count]
        count -= len(session)


def _apart(row: Row, number: int, offset: int) -> Row:
    blocks = row.blocks and tuple(
        range(run.start + offset, run.stop + offset) for run in row.blocks
    )
    session = None if row.session is None else f"{number}/{row.session}"
    return replace(row, arrival=None, session=session, blocks=blocks)
