"""Arithmetic of vectors: cut, normalised, written as JSON or base64, compared, ranked."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

UnitVectors = NDArray[np.float32]
"""(texts, size), each row of length 1."""


def unit(vectors: NDArray[np.float32], size: int | None = None) -> UnitVectors:
    """Return the first ``size`` numbers of each row, scaled to length 1; a row of zeros stays.

    Example: ``unit([[3, 4, 12]], 2)`` is ``[[0.6, 0.8]]``.
    """
    cut = vectors[:, :size].astype(np.float64)
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    scaled: UnitVectors = (cut / np.where(lengths == 0, 1, lengths)).astype(np.float32)
    return scaled


def shown(vectors: UnitVectors, form: Literal["float", "base64"]) -> list[list[float]] | list[str]:
    """Return each row as JSON has it: numbers, or their little-endian float32 in base64."""
    if form == "float":
        numbers: list[list[float]] = vectors.tolist()
        return numbers
    rows = vectors.astype("<f4")
    return [base64.b64encode(row.tobytes()).decode("ascii") for row in rows]


def cosines(first: UnitVectors, second: UnitVectors) -> list[float]:
    """Return the cosine of each pair of rows; one row of ``first`` may stand for all of it."""
    found: list[float] = (first.astype(np.float64) * second).sum(axis=1).tolist()
    return found


def ranked(scores: Sequence[float], most: int | None) -> list[int]:
    """Return the places of the best scores, the best first; of equal ones the first comes first."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return order[: most or None]
