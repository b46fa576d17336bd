"""Which shapes to capture for the batches that were observed.

Choosing K points that cover a set of points in the plane at least cost is hard in general. It is
exact here within one structure, that of `Structure.ROWS`: batch sizes are cut into bands
(b_0, b_1], (b_1, b_2], ...; the batches of a band go to shapes with the batch size of its upper
end, each to the shortest of these that is long enough, or to the ordinary kernels. The published
grid is of this structure. A server then picks the cheapest shape of *all* that cover a batch
(`Ladder.nearest`), so what it gets is never worse than what was computed here.

The optimum is found by dynamic programming. Let g[j, u] be the least cost of all batches of at
most b_j requests with a budget of u. It is the least over i < j of g[i, .] followed by a band
(b_i, b_j], whose levels are chosen by a second recursion over lengths: D[q, u] = min over p < q of
D[p, u - weight of the level q] + cost of the lengths in (p, q], with D[0, .] = g[i, .].

Only sizes that occur need be levels, because a shape that shrinks to the largest batch it takes
gets no slower: costs must not fall with tokens or batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from math import floor, inf, prod

import numpy as np
from numpy.typing import NDArray

from pla_serve.policy.arrays import Array
from pla_serve.policy.shapes.histogram import SizeCount
from pla_serve.policy.shapes.ladder import (
    EagerCost,
    Footprint,
    Ladder,
    Layout,
    Shape,
    ShapeCost,
)

RESOLUTION = 64
"""Units that a budget of bytes or seconds is cut into where shapes differ in what they take."""
MOST_STATES = 4096


class Structure(StrEnum):
    """The family of ladders within which the choice is exact."""

    ROWS = "rows"
    """Bands of batch sizes, each with its own lengths."""
    COLUMNS = "columns"
    """Bands of lengths, each with its own batch sizes. Slower: there are more bands."""
    BEST = "best"
    """Both, and the better one of the two."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on captured shapes. At least one is given, and all that are given hold.

    Raises:
        ValueError: no limit is given, one is negative, or bytes or seconds without ``footprint``.
    """

    shapes: int | None = None
    memory_bytes: float | None = None
    capture_seconds: float | None = None
    footprint: Footprint | None = None
    """Memory and capture time of a shape, for the last two limits."""

    def __post_init__(self) -> None:
        limits = [self.shapes, self.memory_bytes, self.capture_seconds]
        given = [limit for limit in limits if limit is not None]
        if not given or min(given) < 0:
            raise ValueError(f"give shapes, memory_bytes or capture_seconds, >= 0, not {limits}")
        if self.footprint is None and limits[1:] != [None, None]:
            raise ValueError("memory_bytes and capture_seconds need footprint: what a shape takes")


@dataclass(frozen=True, slots=True)
class ShapeChoice:
    """The best ladder of its structure."""

    ladder: Ladder
    seconds: float
    """Predicted mean time of a batch under the structure's rule; the ladder's own is no larger."""


def expected_seconds(ladder: Ladder, demand: Mapping[Shape, SizeCount]) -> float:
    """Mean predicted time of a batch when each runs where `Ladder.fit_size` puts it.

    Raises:
        ValueError: the demand is empty.
    """
    total = sum(seen.weight for seen in demand.values())
    if not total > 0:
        raise ValueError("no batches were observed: record some before shapes are compared")
    costs = [ladder.fit_size(size, s.tokens).seconds * s.weight for size, s in demand.items()]
    return sum(costs) / total


def optimise(
    demand: Mapping[Shape, SizeCount],
    cost: ShapeCost,
    eager: EagerCost,
    budget: Budget,
    *,
    layout: Layout = Layout.PADDED,
    structure: Structure = Structure.ROWS,
) -> ShapeChoice:
    """The shapes that minimise the expected time of a batch, within the budget.

    Exact within ``structure``. A limit in bytes or seconds is exact where all shapes take the
    same; otherwise each is rounded up to RESOLUTION-ths of the limit, which is never exceeded.
    O(b^2 l^2 u) for b batch sizes, l lengths and u budget units that occur.

    Args:
        demand: what was seen of each batch size (`ShapeHistogram.demand`).
        cost: seconds of a captured shape; must not fall with tokens or batch.
        eager: seconds of the ordinary kernels, which run what has no shape.
        budget: what may be captured.
        layout: what the shapes' tokens count.

    Raises:
        ValueError: the demand is empty or has a negative weight, ``cost`` falls somewhere, or the
            budget has too many states.
    """
    cells = {size: seen for size, seen in demand.items() if seen.weight != 0}
    if not cells or min(seen.weight for seen in cells.values()) < 0:
        raise ValueError("the demand needs a positive weight, and no negative one")
    total = sum(seen.weight for seen in cells.values())
    options = [Structure.ROWS, Structure.COLUMNS] if structure is Structure.BEST else [structure]
    found: list[tuple[float, Ladder]] = []
    for option in options:
        problem = _Problem(cells, cost, eager, budget, layout, option is Structure.COLUMNS)
        seconds, shapes = problem.solve()
        found.append((seconds / total, Ladder(shapes, cost, eager=eager, layout=layout)))
    seconds, ladder = min(found, key=lambda pair: pair[0])
    return ShapeChoice(ladder, seconds)


class _Problem:
    """One instance as matrices: bands along ``outer``, levels along ``inner``."""

    def __init__(
        self,
        cells: Mapping[Shape, SizeCount],
        cost: ShapeCost,
        eager: EagerCost,
        budget: Budget,
        layout: Layout,
        columns: bool,
    ) -> None:
        self._columns = columns
        self._inner = sorted({size.batch if columns else size.tokens for size in cells})
        self._outer = sorted({size.tokens if columns else size.batch for size in cells})
        extent = (len(self._inner), len(self._outer))
        self._weight: Array = np.zeros(extent)
        self._eager: Array = np.zeros(extent)
        self._cost: Array = np.zeros(extent)
        self._shapes = [[self._shape(p, j) for j in range(extent[1])] for p in range(extent[0])]
        for p, j in np.ndindex(*extent):
            shape = self._shapes[p][j]
            self._cost[p, j] = cost(*shape)
            if shape in cells:
                self._weight[p, j] = cells[shape].weight
                self._eager[p, j] = eager(cells[shape].tokens, shape.batch)
        if (np.diff(self._cost, axis=0) < 0).any() or (np.diff(self._cost, axis=1) < 0).any():
            raise ValueError(
                "cost falls with tokens or batch somewhere: smooth it, as by a running maximum"
            )
        self._limits, takes = _units(budget, self._shapes, layout)
        self._takes = [
            [tuple(takes[:, p, j].tolist()) for j in range(extent[1])] for p in range(extent[0])
        ]

    def solve(self) -> tuple[float, list[Shape]]:
        """The least weighted sum of seconds, and the shapes that reach it."""
        count = len(self._outer)
        states = tuple(limit + 1 for limit in self._limits)
        best = np.full((count + 1, *states), inf)
        best[0] = 0.0
        begins = np.zeros((count + 1, *states), dtype=np.int64)
        for j in range(count):
            for i, least, spans in self._bands(j):
                hopeful = best[i] + least < best[j + 1]
                if not hopeful.any():
                    continue
                part = tuple(slice(0, int(where.max()) + 1) for where in np.nonzero(hopeful))
                table = self._levels(best[i][part], spans, i, j)
                ends = (table + self._tails(i, j, len(states))).min(axis=0)
                better = ends < best[j + 1][part]
                best[j + 1][part][better] = ends[better]
                begins[j + 1][part][better] = i
        return float(best[(-1, *self._limits)]), self._trace(best, begins)

    def _shape(self, inner: int, outer: int) -> Shape:
        pair = (self._inner[inner], self._outer[outer])
        return Shape(*(pair[::-1] if self._columns else pair))

    def _bands(self, j: int) -> Iterator[tuple[int, float, Array]]:
        """For every band (i, j]: i, what it costs at least, whatever its levels are, and spans.

        spans[p, q] is the cost of the inner sizes p..q whose level is q.
        """
        served = np.zeros((len(self._inner), len(self._inner)))
        for i in range(j, -1, -1):
            # [l, q]: what the batches of length l cost if their level is q
            served += self._weight[:, i, None] * np.minimum(
                self._eager[:, i, None], self._cost[None, :, j]
            )
            sums = np.vstack([np.zeros(len(self._inner)), np.cumsum(served, axis=0)])
            yield i, float(np.trace(served)), np.diagonal(sums[1:]) - sums[:-1]

    def _tails(self, i: int, j: int, dimensions: int) -> Array:
        """[p]: the cost of a band's lengths from p on, on the ordinary kernels."""
        costs = (self._weight * self._eager)[:, i : j + 1].sum(axis=1)
        tails = np.append(np.cumsum(costs[::-1])[::-1], 0.0)
        return tails.reshape(-1, *[1] * dimensions)

    def _levels(self, before: Array, spans: Array, i: int, j: int) -> Array:
        """[q, u]: the least cost if the last level of the band is q-1 and u is spent at most.

        Lengths that do not occur in the band are no levels of it.
        """
        table = np.full((len(self._inner) + 1, *before.shape), inf)
        table[0] = before
        for q in np.flatnonzero(self._weight[:, i : j + 1].any(axis=1)).tolist():
            here, there = _moves(self._takes[q][j], before.shape)
            reach = table[(slice(0, q + 1), *here)]
            if reach.size:
                column = spans[: q + 1, q].reshape(-1, *[1] * before.ndim)
                table[q + 1][there] = (reach + column).min(axis=0)
        return table

    def _trace(self, best: Array, begins: NDArray[np.int64]) -> list[Shape]:
        """Goes back from the end: bands first, and the levels of each computed once more."""
        shapes: list[Shape] = []
        state, end = tuple(self._limits), len(self._outer)
        while end > 0:
            i, j = int(begins[(end, *state)]), end - 1
            spans = next(spans for begin, _, spans in self._bands(j) if begin == i)
            table = self._levels(best[i], spans, i, j)
            tails = self._tails(i, j, 0)
            q = int(np.argmin(_at(table, state) + tails))
            while q > 0:
                shapes.append(self._shapes[q - 1][j])
                takes = self._takes[q - 1][j]
                state = tuple(n - take for n, take in zip(state, takes, strict=True))
                q = int(np.argmin(_at(table[:q], state) + spans[:q, q - 1]))
            end = i
        return shapes


@lru_cache(maxsize=4096)
def _moves(takes: tuple[int, ...], states: tuple[int, ...]) -> tuple[tuple[slice, ...], ...]:
    """The budget states from which a shape that takes so much can be paid, and where they lead."""
    here = tuple(slice(0, max(0, n - take)) for n, take in zip(states, takes, strict=True))
    return here, tuple(slice(take, None) for take in takes)


def _at(table: Array, state: tuple[int, ...]) -> Array:
    """[q]: the column of a table of levels at one budget state."""
    return np.asarray(table[(slice(None), *(slice(n, n + 1) for n in state))]).reshape(-1)


def _units(
    budget: Budget, shapes: list[list[Shape]], layout: Layout
) -> tuple[list[int], NDArray[np.int64]]:
    """Limits in whole units, and what each shape takes of each: (limits, inner, outer)."""
    extent = (len(shapes), len(shapes[0]))
    count = prod(extent) if budget.shapes is None else min(budget.shapes, prod(extent))
    limits: list[int] = []
    takes: list[NDArray[np.int64]] = []
    for limit, taken in _limits(budget, shapes, layout):
        if taken.min() == taken.max():  # a limit on the number of shapes in other words
            count = min(count, floor(limit / taken.min())) if taken.min() > 0 else count
            continue
        unit = limit / RESOLUTION if limit else 1.0
        limits.append(RESOLUTION if limit else 0)
        takes.append(np.minimum(np.ceil(taken / unit), RESOLUTION + 1).astype(np.int64))
    if not limits or count < prod(extent):
        limits.append(count)
        takes.append(np.ones(extent, dtype=np.int64))
    if prod(limit + 1 for limit in limits) > MOST_STATES:
        raise ValueError(
            f"the limits {limits} make more than {MOST_STATES} states: give fewer of them"
        )
    return limits, np.array(takes)


def _limits(
    budget: Budget, shapes: list[list[Shape]], layout: Layout
) -> Iterator[tuple[float, Array]]:
    """The limits in bytes and seconds that are given, with what each shape takes of them."""
    footprint = budget.footprint
    if footprint is None:
        return
    if budget.memory_bytes is not None:
        rows = [[footprint.bytes_of(shape, layout) for shape in row] for row in shapes]
        yield budget.memory_bytes, np.array(rows)
    if budget.capture_seconds is not None:
        rows = [[footprint.seconds_of(shape, layout) for shape in row] for row in shapes]
        yield budget.capture_seconds, np.array(rows)
