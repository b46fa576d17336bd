"""The published boundary L_m(H), fitted to the prefills that a server runs."""

from __future__ import annotations

from collections import deque

from pla_serve.policy.cost import CostProfile
from pla_serve.policy.protocol import Batch
from pla_serve.policy.published.latency import LatencyModel, fit_latency

USUAL_BOUNDARY = 256
"""Tokens. Setting that the publication uses throughout; the model starts from it."""
SAMPLES = 256
"""Lone prefills that are remembered: enough for three coefficients, few enough to follow a machine
that changes."""
REFIT_EVERY = 128
"""Lone prefills between two fits. A fit takes about two milliseconds, so that fewer than one
observation in a hundred pays for one."""


class FittedBoundary:
    """`LatencyModel.boundary` of the machine as it was measured, within bounds.

    The publication fits alpha, beta, gamma_w and gamma_r to samples taken while serving. Measured
    times decide beta + gamma_w, but not how the sum is divided (see `fit_latency`), so beta stays
    what the machine's profile says of a token's arithmetic. The difference gamma_w - beta, which is
    all that L_m(0) depends on, is then a small difference of two large numbers: an error of 1% in
    beta moves L_m(0) by thousands of tokens on an H200. Hence the bounds, by default the range that
    was published for A100 to H200 and models of 7B to 32B.

    Args:
        profile: what is known of the machine at start.
        least, most: bounds of L_m, tokens.
    """

    def __init__(self, profile: CostProfile, least: int, most: int) -> None:
        alpha, beta = profile.per_attention / 2, profile.per_token
        self._model = LatencyModel(alpha, beta, beta + USUAL_BOUNDARY * alpha, profile.per_kv)
        self._beta = beta
        self._least, self._most = least, most
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=SAMPLES)
        self._since_fit = 0

    @property
    def model(self) -> LatencyModel:
        """Model in use."""
        return self._model

    def tokens(self, history: int) -> int:
        """L_m for a prefill on ``history`` cached tokens."""
        return round(min(max(self._model.boundary(history), self._least), self._most))

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learn from a batch that is a single prefill, or a chunk of one; skip any other."""
        if len(batch.prefills) != 1 or batch.decodes:
            return
        chunk = batch.prefills[0]
        self._samples.append((chunk.tokens, chunk.history, seconds))
        self._since_fit += 1
        if self._since_fit >= REFIT_EVERY:
            self._since_fit = 0
            self._model = fit_latency(list(self._samples), self._model, beta=self._beta)
