"""Fits the coefficients of the cost model to what was measured: bounded, weighted, robust."""

from __future__ import annotations

from collections import OrderedDict, deque

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
"""(features,) or (samples,) float64."""

STRATA = 64
SAMPLES_PER_STRATUM = 8
HALF_LIFE = 256
"""Observations after which a sample counts half."""
LEAST_WEIGHT = 0.02
OLD = 6 * HALF_LIFE
"""Observations after which a sample counts LEAST_WEIGHT."""
HOLD = 0.05
"""Weight of the last predictions for typical batches against samples of weight 1: they decide what
the samples do not."""
RIDGE = 1e-3
"""Weight of the last coefficients themselves, so that there is always one best solution."""
LEAST_SHARE = 0.03
"""Coefficients that explain less of a sample's time than this may change as if they explained so
much."""
ROBUST_ROUNDS = 6


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

    def rescale_earlier(self, last: int, factor: float) -> None:
        """All but the last so many samples were measured by another clock: their seconds count
        ``factor`` times, and as little as the oldest ones.

        What the last samples leave open, the earlier ones still say: in a minute of decoding
        attention and KV grow together, and only prefills tell which of them costs what.
        """
        for stratum in self._strata.values():
            for place, (stamp, work, seconds) in enumerate(stratum):
                if stamp < self._count - last:
                    stratum[place] = (min(stamp, self._count - OLD), work, seconds * factor)

    def samples(self) -> tuple[Vector, Vector, Vector]:
        """Features (samples, features), seconds (samples,) and weights (samples,)."""
        rows = [row for stratum in self._strata.values() for row in stratum]
        ages = np.array([self._count - row[0] for row in rows], dtype=np.float64)
        weights = np.maximum(np.exp2(-ages / HALF_LIFE), LEAST_WEIGHT)
        return np.array([row[1] for row in rows]), np.array([row[2] for row in rows]), weights


def refit(
    features: Vector, seconds: Vector, weights: Vector, last: Vector, typical: Vector
) -> Vector:
    """Coefficients that explain the samples, none negative.

    Least squares of the *relative* error (a wrong 10 ms matters more in a batch of 20 ms than in
    one of a second), non-negative (`scipy.optimize.nnls`). Predictions for ``typical`` batches are
    held where they were, but for a factor common to all, with little weight: milliseconds that
    small batches take too long could be anything's, and of attention they would make hours in a
    long prompt. Errors are relative to the larger of measured and predicted, so they lie between
    -1 and 1, and count less the further they lie beyond the median (Huber weights, a few rounds of
    reweighting): outliers have little say.

    Args:
        features: (samples, features), not negative.
        seconds: (samples,), positive.
        weights: (samples,), positive.
        last: (features,), the coefficients so far.
        typical: (batches, features).

    Returns:
        (features,); ``last`` if the solver finds no solution.
    """
    top = (features / seconds[:, None]).max(axis=0)
    seen = top > 0
    if not seen.any():
        return last
    unit = features[:, seen] / top[seen]  # a coefficient is now a share of some sample's time
    before = last[seen] * top[seen]
    if (believed := unit @ before).all():  # a machine that is slower is so in all it does
        before *= np.median(seconds / believed)
    solution = before
    held = typical[:, seen] / top[seen]
    expected = held @ before
    held, expected = held[expected > 0], expected[expected > 0]
    robust = np.ones_like(seconds)
    for _ in range(ROBUST_ROUNDS):
        scale = np.sqrt(weights * robust) / np.maximum(seconds, unit @ solution)
        hold = HOLD / np.maximum(expected, held @ solution)
        rows = np.concatenate([unit * scale[:, None], held * hold[:, None]])
        targets = np.concatenate([seconds * scale, expected * hold])
        try:
            solution = _solve(rows, targets, before)
        except (RuntimeError, np.linalg.LinAlgError):  # did not converge
            return last
        predicted = unit @ solution
        errors = np.abs(predicted - seconds) / np.maximum(predicted, seconds)
        robust = np.minimum(1, (1.5 * np.median(errors) + 0.02) / np.maximum(errors, 1e-9))
    result = last.copy()
    result[seen] = solution / top[seen]
    return result


def _solve(rows: Vector, targets: Vector, before: Vector) -> Vector:
    """argmin |rows x - targets|^2 + |ridge (x - before)|^2 over x >= 0, by its normal equations."""
    # It is imported at the first fit, because commands that fit nothing would wait for it too.
    from scipy.optimize import nnls

    ridge = (RIDGE / np.maximum(before, LEAST_SHARE)) ** 2
    factor = np.linalg.cholesky(rows.T @ rows + np.diag(ridge))
    right = np.linalg.solve(factor, rows.T @ targets + ridge * before)
    solution, _ = nnls(factor.T, right)
    return np.asarray(solution)
