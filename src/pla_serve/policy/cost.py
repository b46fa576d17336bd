"""Predicts how long a batch takes. Seconds are the one currency in which policies compare."""

from __future__ import annotations

from collections import deque
from dataclasses import astuple, dataclass
from math import inf, isfinite
from statistics import median
from typing import NamedTuple

import numpy as np

from pla_serve.policy.boundary import crossing
from pla_serve.policy.fit import SampleWindow, Vector, refit
from pla_serve.policy.protocol import Batch

LEAST_BOUNDARY = 256
"""Tokens. Below this a prompt is short whatever bounds it: it is over before it is in the way."""
MOST_BOUNDARY = 1024
REFIT_EVERY = 256
"""Observations between two fits, so that fewer than one in a hundred pays for one."""
FIRST_REFIT = 4
"""The first fit; the next ones come after twice as many observations each, up to REFIT_EVERY."""
ALARM = 0.25
"""Median relative error of ALARM_WINDOW observations that means that the machine has changed."""
ALARM_WINDOW = 16
BULK_TOKENS = 48
"""Tokens from which a batch counts for `CostModel.bulk`."""
LEAST_BULK = 8
"""Samples of such batches that it takes."""
NEW_EPOCH = 0.2
"""Relative change of the predictions that makes queues sort again."""
NEW_BOUNDARY = 0.25
"""Relative change of L_m below which the old one stays, so that classes do not flicker."""


class Work(NamedTuple):
    """Work of a batch, or of a whole queue, in the units that cost seconds. Works add up."""

    tokens: float
    """Tokens through the linear layers."""
    attention: float
    """Sum of tokens * (history + tokens / 2)."""
    kv: float
    """KV tokens read: the sum of history + tokens over chunks."""
    sequences: float
    launches: float
    """Batches."""


TYPICAL = np.array(
    [
        Work(1, 500, 500, 1, 1),  # decoding alone
        Work(16, 16_000, 16_000, 16, 1),  # and together
        Work(64, 64 * 32, 64, 1, 1),  # a chat turn
        Work(2048, 2048 * 1024, 2048, 1, 1),  # a document
        Work(64, 64 * (4096 + 32), 4096 + 64, 1, 1),  # a question about one
        Work(2048, 2048 * (8192 + 1024), 8192 + 2048, 1, 1),  # the last part of a long one
    ],
    dtype=np.float64,
)
"""Batches whose predictions a fit holds while it sees others; see `fit.refit`."""


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Seconds for one unit of each field of `Work`, in its order; none negative.

    The defaults are those of a 135M-parameter model on two CPU cores, as a place to start from.
    """

    per_token: float = 1.5e-3
    per_attention: float = 2e-7
    per_kv: float = 1e-6
    per_sequence: float = 2e-4
    per_launch: float = 3e-2

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, not {value}")

    @classmethod
    def roofline(
        cls,
        *,
        parameters: float,
        weight_bytes: float,
        attention_width: int,
        layers: int,
        kv_bytes_per_token: float,
        flops: float,
        bytes_per_second: float,
        launch_seconds: float,
    ) -> CostProfile:
        """Coefficients at the device's peak rates: a start until measurements arrive.

        Two operations a parameter and token; four a layer, unit of ``attention_width`` (heads times
        head size) and pair of tokens; weights are read once a launch, KV once a sequence.

        Raises:
            ValueError: ``flops`` or ``bytes_per_second`` is not positive.
        """
        if flops <= 0 or bytes_per_second <= 0:
            raise ValueError("flops and bytes_per_second must be positive")
        return cls(
            per_token=2 * parameters / flops,
            per_attention=4 * layers * attention_width / flops,
            per_kv=kv_bytes_per_token / bytes_per_second,
            per_sequence=0.0,
            per_launch=weight_bytes / bytes_per_second + launch_seconds,
        )


def work_of(batch: Batch) -> Work:
    """The work of one batch; O(chunks)."""
    tokens = twice_attention = kv = 0
    for _, count, history, _ in (*batch.prefills, *batch.decodes):
        tokens += count
        twice_attention += count * (2 * history + count)
        kv += history + count
    sequences = len(batch.prefills) + len(batch.decodes)
    return Work(tokens, twice_attention / 2, kv, sequences, 1)


class CostModel:
    """Seconds for any batch, linear in `Work`, fitted to what is observed.

    Starts from ``profile`` and ``bulk``. `observe` takes samples, from a warm-up or from serving,
    and fits again now and then (`fit.refit`); between fits it costs microseconds.
    """

    def __init__(self, profile: CostProfile | None = None, bulk: CostProfile | None = None) -> None:
        self._profile = profile or CostProfile()
        self._window = SampleWindow()
        self._ratios: deque[float] = deque(maxlen=64)
        self._observed = 0
        self._fitted_at = 0
        self._patience = FIRST_REFIT
        self._epoch = 0
        self._epoch_profile = self._profile
        self._boundary_profile = self._profile
        self._bulk = bulk

    @property
    def profile(self) -> CostProfile:
        """The coefficients in use."""
        return self._profile

    @property
    def bulk(self) -> CostProfile:
        """Coefficients that are fitted to batches of at least BULK_TOKENS alone.

        `profile` has one price for a launch, which is mostly the reading of weights. A decode step
        pays it in full. A batch of many tokens may read weights while it computes, and pay less.
        """
        return self._bulk or self._profile

    @property
    def epoch(self) -> int:
        """Grows when predictions have moved so far that `epoch_prefill_seconds` follows them."""
        return self._epoch

    def seconds(self, batch: Batch) -> float:
        """Predicted time of one batch; O(chunks)."""
        return self.work_seconds(*work_of(batch))

    def work_seconds(
        self, tokens: float, attention: float, kv: float, sequences: float, launches: float
    ) -> float:
        """Predicted time of the fields of a `Work`."""
        return _seconds(self._profile, tokens, attention, kv, sequences, launches)

    def prefill_seconds(self, new_tokens: int, history: int, chunk: int | None = None) -> float:
        """Predicted time of a prefill alone, in equal chunks of at most ``chunk`` tokens."""
        return _prefill_seconds(self._profile, new_tokens, history, chunk)

    def epoch_prefill_seconds(self, new_tokens: int, history: int, chunk: int) -> float:
        """Predicted time of a prefill alone, by coefficients that change with `epoch` only.

        For orders: two equal requests must not swap because a fit came between their arrivals.
        """
        return _prefill_seconds(self._epoch_profile, new_tokens, history, chunk)

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learn that ``batch`` took ``seconds``.

        Samples that say nothing (an empty batch, or a time that is not positive and finite, as
        from a clock too coarse) are skipped.
        """
        work = work_of(batch)
        if work.tokens == 0 or not 0 < seconds < inf:
            return
        self._ratios.append(self.work_seconds(*work) / seconds)
        self._window.add(work, seconds, int(work.tokens), int(work.kv))
        self._observed += 1
        since = self._observed - self._fitted_at
        if self._patience == REFIT_EVERY and since % ALARM_WINDOW == 0 and self._alarm():
            self._start_again()
        if since >= self._patience:
            self._refit()

    def error(self) -> float:
        """Median absolute relative error of the last predictions; 0 before the first."""
        return median([abs(ratio - 1) for ratio in self._ratios]) if self._ratios else 0.0

    def boundary(self, history: int = 0) -> int:
        """L_m: the most new tokens, on ``history`` cached ones, that still count as short.

        `boundary.crossing` on coefficients that change only when L_m moves by NEW_BOUNDARY,
        clamped to LEAST_BOUNDARY..MOST_BOUNDARY.
        """
        return round(_clamped_crossing(self._boundary_profile, history))

    def _alarm(self) -> bool:
        return median([abs(ratio - 1) for ratio in self._last_ratios()]) > ALARM

    def _start_again(self) -> None:
        """Fit anew from the last samples, because the machine has changed.

        Earlier samples are scaled to the speed of the last ones, as after a change of the clock
        rate. Times that did not change alike are corrected by the next fits, which come as often as
        at the start.
        """
        factor = 1 / max(median(self._last_ratios()), 1e-9)
        self._window.rescale_earlier(ALARM_WINDOW, factor)
        self._profile = CostProfile(*(unit * factor for unit in astuple(self._profile)))
        self._bulk = None
        self._patience = FIRST_REFIT

    def _last_ratios(self) -> list[float]:
        return list(self._ratios)[-ALARM_WINDOW:]

    def _refit(self) -> None:
        self._fitted_at = self._observed
        samples = self._window.samples()
        self._patience = min(2 * self._patience, REFIT_EVERY)
        fitted = refit(*samples, np.array(astuple(self._profile)), TYPICAL)
        self._profile = CostProfile(*fitted.tolist())
        self._bulk = self._fit_bulk(*samples)
        if _moved(_marks(self._epoch_profile), _marks(self._profile), NEW_EPOCH):
            self._epoch += 1
            self._epoch_profile = self._profile
        old, new = (
            [_clamped_crossing(profile, history) for history in (0, 4096)]
            for profile in (self._boundary_profile, self._profile)
        )
        if _moved(old, new, NEW_BOUNDARY):
            self._boundary_profile = self._profile

    def _fit_bulk(self, works: Vector, seconds: Vector, weights: Vector) -> CostProfile | None:
        large = works[:, 0] >= BULK_TOKENS
        if large.sum() < LEAST_BULK:
            return None
        last = np.array(astuple(self._profile))
        typical = TYPICAL[TYPICAL[:, 0] >= BULK_TOKENS]
        fitted = refit(works[large], seconds[large], weights[large], last, typical)
        return CostProfile(*fitted.tolist())


def _seconds(
    unit: CostProfile,
    tokens: float,
    attention: float,
    kv: float,
    sequences: float,
    launches: float,
) -> float:
    return (
        unit.per_token * tokens
        + unit.per_attention * attention
        + unit.per_kv * kv
        + unit.per_sequence * sequences
        + unit.per_launch * launches
    )


def _prefill_seconds(unit: CostProfile, new_tokens: int, history: int, chunk: int | None) -> float:
    launches = -(-new_tokens // chunk) if chunk else 1
    return _seconds(
        unit,
        new_tokens,
        new_tokens * (history + new_tokens / 2),
        launches * history + new_tokens * (launches + 1) / 2,
        launches,
        launches,
    )


def _marks(profile: CostProfile) -> list[float]:
    """Predictions for a chat turn, a document and a follow-up to a document."""
    turns = ((64, 0), (2048, 0), (64, 4096))
    return [_prefill_seconds(profile, new, history, None) for new, history in turns]


def _clamped_crossing(profile: CostProfile, history: float) -> float:
    tokens = crossing(
        history,
        profile.per_token,
        profile.per_attention,
        profile.per_kv,
        profile.per_launch + profile.per_sequence,
    )
    return min(max(tokens, LEAST_BOUNDARY), MOST_BOUNDARY)


def _moved(old: list[float], new: list[float], by: float) -> bool:
    return any(abs(b - a) > by * a for a, b in zip(old, new, strict=True))
