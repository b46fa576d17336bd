"""Fits the coefficients of the cost model to what was measured: bounded, weighted, robust."""

from __future__ import annotations

from collections import OrderedDict, deque

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Vector = NDArray[np.float64]
"""(features,) or (samples,) float64."""

STRATA = 64
SAMPLES_PER_STRATUM = 8
HALF_LIFE = 256
"""Observations after which a sample counts half."""
LEAST_WEIGHT = 0.02
PULL = 0.1
"""Weight of the last coefficients against samples of weight 1: it decides what these do not."""
ROBUST_ROUNDS = 3


class SampleWindow:
    """The last few samples of every kind of batch.

    One window over all batches would forget what a long prefill costs during a minute of decoding.
    So samples are kept by the magnitudes of their tokens and of the KV they read, a few each; the
    kind that was seen least recently makes room.
    """

    def __init__(self) -> None:
        self._strata: OrderedDict[tuple[int, int], deque[tuple[int, tuple[float, ...], float]]] = (
            OrderedDict()
        )
        self._count = 0

    def add(self, work: tuple[float, ...], seconds: float, tokens: int, kv: int) -> None:
        """Keep ``seconds`` measured for the features ``work``; O(1)."""
        key = (tokens.bit_length(), kv.bit_length() // 2)
        stratum = self._strata.get(key)
        if stratum is None:
            stratum = self._strata[key] = deque(maxlen=SAMPLES_PER_STRATUM)
            if len(self._strata) > STRATA:
                self._strata.popitem(last=False)
        self._strata.move_to_end(key)
        stratum.append((self._count, work, seconds))
        self._count += 1

    def samples(self) -> tuple[Vector, Vector, Vector]:
        """Features (samples, features), seconds (samples,) and weights (samples,)."""
        rows = [row for stratum in self._strata.values() for row in stratum]
        ages = np.array([self._count - row[0] for row in rows], dtype=np.float64)
        weights = np.maximum(np.exp2(-ages / HALF_LIFE), LEAST_WEIGHT)
        return np.array([row[1] for row in rows]), np.array([row[2] for row in rows]), weights


def refit(features: Vector, seconds: Vector, weights: Vector, last: Vector) -> Vector:
    """Coefficients that explain the samples, none negative.

    Least squares of the *relative* error (a wrong 10 ms matters more in a batch of 20 ms than in
    one of a second), non-negative, with Huber weights found by a few rounds of reweighting, and a
    slight pull to ``last`` so that directions which the samples leave open do not drift.

    Args:
        features: (samples, features), not negative.
        seconds: (samples,), positive.
        weights: (samples,), positive.
        last: (features,), the coefficients so far.

    Returns:
        (features,); ``last`` if the solver finds no solution.
    """
    relative = features / seconds[:, None]
    top = relative.max(axis=0)
    seen = top > 0
    if not seen.any():
        return last
    unit = relative[:, seen] / top[seen]  # now a coefficient is a share of some sample's time
    before = last[seen] * top[seen]
    pull = PULL * np.eye(int(seen.sum()))
    robust = np.ones_like(seconds)
    solution = before
    for _ in range(ROBUST_ROUNDS):
        scale = np.sqrt(weights * robust)
        try:
            solution, _ = nnls(
                np.vstack([unit * scale[:, None], pull]), np.concatenate([scale, PULL * before])
            )
        except RuntimeError:  # did not converge
            return last
        errors = np.abs(unit @ solution - 1)
        robust = np.minimum(1, (1.5 * np.median(errors) + 0.02) / np.maximum(errors, 1e-9))
    result = last.copy()
    result[seen] = solution / top[seen]
    return result
