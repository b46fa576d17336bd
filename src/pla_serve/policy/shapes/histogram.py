"""Counts the sizes of dispatched batches: what the choice of shapes is made for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pla_serve.policy.shapes.ladder import Shape


class SizeCount(NamedTuple):
    """Observations of one batch size."""

    weight: float
    """Number of observations, in any unit."""
    tokens: float
    """Mean real tokens of the whole batch: what ordinary kernels compute."""


ShapeDemand = dict[Shape, SizeCount]

RESCALE_AT = 1e100


class ShapeHistogram:
    """A decayed count of (tokens, batch); its memory does not grow.

    Decay is by count and not by time: a quiet night does not forget the day.

    Args:
        most_tokens, most_batch: batches beyond are counted in `outside` only.
        granularity: tokens are rounded up to a multiple of it.
        half_life: batches after which one counts half.

    Raises:
        ValueError: an argument is below 1.
    """

    def __init__(
        self,
        most_tokens: int = 256,
        most_batch: int = 64,
        *,
        granularity: int = 1,
        half_life: float = 16_384,
    ) -> None:
        if min(most_tokens, most_batch, granularity, half_life) < 1:
            raise ValueError(
                "most_tokens, most_batch, granularity and half_life must be at least 1, not "
                f"{most_tokens}, {most_batch}, {granularity}, {half_life}"
            )
        self._most_batch = most_batch
        self._step = granularity
        extent = (-(-most_tokens // granularity), most_batch)
        self._counts: NDArray[np.float64] = np.zeros(extent)
        self._tokens: NDArray[np.float64] = np.zeros(extent)
        self._outside = 0.0
        self._growth = 2.0 ** (1 / half_life)
        self._unit = 1.0

    def record(self, size: Shape, real_tokens: int) -> None:
        """Count one dispatched batch of so many real tokens; O(1).

        Raises:
            ValueError: it has no tokens or no requests.
        """
        tokens, batch = size
        if tokens < 1 or batch < 1:
            raise ValueError(f"a batch has at least one token and one request, not {size}")
        row = -(-tokens // self._step) - 1
        self._unit *= self._growth  # newer counts grow, instead of all older ones shrinking
        if row < len(self._counts) and batch <= self._most_batch:
            self._counts[row, batch - 1] += self._unit
            self._tokens[row, batch - 1] += self._unit * real_tokens
        else:
            self._outside += self._unit
        if self._unit > RESCALE_AT:
            self._counts /= self._unit
            self._tokens /= self._unit
            self._outside /= self._unit
            self._unit = 1.0

    def demand(self) -> ShapeDemand:
        """Weights in units of the newest batch."""
        seen: ShapeDemand = {}
        for row, column in np.argwhere(self._counts).tolist():
            count = float(self._counts[row, column])
            mean = float(self._tokens[row, column]) / count
            seen[Shape((row + 1) * self._step, column + 1)] = SizeCount(count / self._unit, mean)
        return seen

    @property
    def outside(self) -> float:
        """Weight of the batches that were beyond the limits, in the same unit."""
        return self._outside / self._unit
