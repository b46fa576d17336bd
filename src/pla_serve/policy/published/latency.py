"""The published latency model of one prefill, its boundary L_m, and its fit.

With L new tokens on H cached ones (PLA-Serve, arXiv 2601.11589)::

    T(L, H) = compute + memory
    compute = alpha * L * (L + 2 H) + beta * L
    memory  = gamma_w * L + gamma_r * H

`boundary.crossing` is the project's own reading of the same question: there the weights are read
once a launch (``fixed``), here they are a cost per token (``gamma_w``). The algebra is one:
``LatencyModel(a, b, w, r).boundary(H) == crossing(H, b - w + r, 2 * a, r, 0)``. Schedulers of this
project use `crossing`, whose coefficients a batch cost model fits; this model is for comparison
with what was published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf, isfinite, sqrt

import numpy as np

from pla_serve.policy.fit import Vector, refit

FIT_PASSES = 4
"""Each pass starts from the last, so that the hold of `fit.refit` on the start fades."""
TYPICAL = ((64, 0), (2048, 0), (64, 4096), (2048, 8192))
"""(L, H) whose times a fit holds where the samples say nothing of them."""


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """The four coefficients, none negative.

    Raises:
        ValueError: a coefficient is negative or not finite.
    """

    alpha: float
    """Seconds per unit of L * (L + 2 H)."""
    beta: float
    """Seconds of compute a new token."""
    gamma_w: float
    """Seconds of memory traffic a new token."""
    gamma_r: float
    """Seconds of memory traffic a cached token."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, not {value}")

    def compute_seconds(self, new_tokens: float, history: float) -> float:
        """The compute part of T."""
        return new_tokens * (self.alpha * (new_tokens + 2 * history) + self.beta)

    def memory_seconds(self, new_tokens: float, history: float) -> float:
        """The memory part of T."""
        return self.gamma_w * new_tokens + self.gamma_r * history

    def seconds(self, new_tokens: float, history: float) -> float:
        """T(L, H)."""
        return self.compute_seconds(new_tokens, history) + self.memory_seconds(new_tokens, history)

    @property
    def limit(self) -> float:
        """Limit of L_m as H grows: gamma_r / (2 alpha), tokens; infinite if alpha is 0.

        L_m grows with H where L_m(0) lies below this limit, as it does on the published machines,
        and falls towards it where it lies above.
        """
        return self.gamma_r / (2 * self.alpha) if self.alpha > 0 else inf

    def boundary(self, history: float = 0) -> float:
        """L_m(H): new tokens below which memory takes longer than compute.

        Returns:
            Tokens. 0 if no prefill is bound by memory (for H = 0: gamma_w <= beta); infinite if
            all are.
        """
        b = 2 * self.alpha * history + self.beta - self.gamma_w
        d = self.gamma_r * history
        root = hypot(b, 2 * sqrt(self.alpha) * sqrt(d))
        if b > 0:  # the two forms of the same root; each is exact where the other one cancels
            return 2 * d / (b + root)
        if self.alpha == 0:
            return inf if b < 0 or d > 0 else 0.0
        return (root - b) / (2 * self.alpha)


def fit_latency(
    samples: Sequence[tuple[float, float, float]],
    start: LatencyModel,
    *,
    beta: float | None = None,
    gamma_w: float | None = None,
) -> LatencyModel:
    """The coefficients that explain measured times; outliers have little say (`fit.refit`).

    Times alone decide alpha, gamma_r and the *sum* beta + gamma_w: both are seconds a new token,
    and no choice of samples tells one from the other. Samples of small L do not either, because
    the model adds the parts instead of taking the larger one. So one of the two has to be known:
    ``beta`` as two operations a parameter over the device's speed, or ``gamma_w`` as the bytes
    moved a token over its bandwidth. Given neither, the sum is split in the proportion that it has
    in ``start``.

    Args:
        samples: (L, H, seconds) of lone prefills. Those that say nothing (no new tokens, or a time
            that is not positive and finite) are skipped.
        start: what the samples leave open stays as it is here.
        beta, gamma_w: at most one of them, seconds a token. It is capped at the fitted sum.

    Raises:
        ValueError: both are given, or one is negative or not finite.
    """
    if beta is not None and gamma_w is not None:
        raise ValueError("give beta or gamma_w, not both: the samples decide their sum")
    known = beta if beta is not None else gamma_w
    if known is not None and not (isfinite(known) and known >= 0):
        raise ValueError(f"beta and gamma_w must be finite and at least 0, not {known}")
    useful = [sample for sample in samples if sample[0] > 0 and 0 < sample[2] < inf]
    last = np.array([start.alpha, start.beta + start.gamma_w, start.gamma_r])
    if useful:
        new, history, seconds = np.array(useful, dtype=np.float64).T
        typical = _features(*np.array(TYPICAL, dtype=np.float64).T)
        for _ in range(FIT_PASSES):
            last = refit(_features(new, history), seconds, np.ones_like(seconds), last, typical)
    alpha, token, gamma_r = last.tolist()
    if beta is not None:
        compute = min(beta, token)
    elif gamma_w is not None:
        compute = token - min(gamma_w, token)
    else:
        whole = start.beta + start.gamma_w
        compute = token * (start.beta / whole if whole > 0 else 0.5)
    return LatencyModel(alpha, compute, token - compute, gamma_r)


def _features(new: Vector, history: Vector) -> Vector:
    """(samples, 3): what alpha, beta + gamma_w and gamma_r are multiplied with."""
    return np.stack([new * (new + 2 * history), new, history], axis=1)
