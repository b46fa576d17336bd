"""Corrections of predicted times to first tokens, learned from how earlier predictions turned out.

A policy's `predicted_wait` is blind in ways of its own: hrrn counts all that waits although a
newcomer soon passes much of it, others do not foresee what arrives later and goes first. So a
prediction is corrected by what came of earlier ones like it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from math import ceil, inf, log2
from statistics import median

WINDOW = 256
"""Ratios remembered of each group and of each class."""
LEAST = 20
"""Ratios before a window is believed."""
STALE = 1024
"""Observations of its class without one of its own after which a group is forgotten."""
COVERAGE = 0.9
"""Share of first tokens that `Forecast.upper` promises to cover."""
PACE = 0.01
"""Change of the quantile that is taken for ``upper``, for each miss or hit."""
LOWEST_LEVEL = 0.5
BRIEF = 1e-3
"""Seconds. Shorter waits depend on clocks and single batches, so they count as this long."""
RECENT = 64
"""Forecasts over which errors and coverage are reported."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Prediction for one request, made on its arrival: seconds from ``made`` to its first token."""

    short: bool
    made: float
    predicted: float
    """Prediction of the policy."""
    median: float
    """Corrected prediction: as likely too long as too short."""
    upper: float
    """Exceeded by one in ten (1 - COVERAGE); infinite until enough was seen."""

    @property
    def factor(self) -> float:
        """Ratio of the corrected prediction to the policy's."""
        return self.median / self.predicted if self.predicted > 0 else 1.0


class RatioWindow:
    """The last `WINDOW` values, and their quantiles: O(1) to ask.

    Adding is a binary search and moves at most WINDOW places of a list.
    """

    def __init__(self) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._order)

    def add(self, value: float) -> None:
        """Take in a value; the oldest of a full window leaves."""
        if len(self._order) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(value)
        insort(self._sorted, value)

    def quantile(self, level: float) -> float:
        """The least value that the next one exceeds with a chance of at most ``1 - level``.

        It is value number ``ceil(level * (n + 1))`` of n, which holds for any distribution if
        the next value and these are exchangeable (split conformal prediction). The largest where
        that number exceeds n: then there are too few for the claim.

        Raises:
            ValueError: nothing was added yet.
        """
        count = len(self._sorted)
        if not count:
            raise ValueError("an empty window has no quantile; add a value first")
        return self._sorted[min(count, max(1, ceil(level * (count + 1)))) - 1]

    def median(self) -> float:
        """The middle value, or the one below the middle."""
        return self._sorted[(len(self._sorted) - 1) // 2]


class Calibration:
    """Corrects predictions by the ratios of actual to predicted times; owns no clock.

    Ratios are kept by class and by size of the prediction, a group for each factor of two. Within a
    group it hardly matters whether errors add or multiply; across groups it does: a wait of
    milliseconds is often off by a whole batch, one of a minute by a few percent. A group that has
    seen too little, or nothing for long, goes by the nearest that has, or by its class. So one
    whose predictions are refused does not keep an opinion that nothing can refute any more.

    Queues are not exchangeable: waits of one busy spell go together, load changes, and what
    waits longest is heard of last, so that in a backlog beyond all that was seen ``upper`` is too
    low until the first of it are served. The quantile behind ``upper`` is moved with every miss and
    hit (adaptive conformal inference, Gibbs and Candès 2021), which brings the share of misses to
    ``1 - COVERAGE`` in the long run whatever the arrivals do, as long as the window holds values
    large enough.
    """

    def __init__(self) -> None:
        self._classes = {short: _Class() for short in (True, False)}

    def forecast(self, predicted: float, short: bool, now: float) -> Forecast:
        """Correct a prediction of so many seconds."""
        kind = self._classes[short]
        window = kind.window(_group(predicted))
        if window is None:
            return Forecast(short, now, predicted, predicted, inf)
        base = max(predicted, BRIEF)
        middle = base * window.median() if predicted > 0 else 0.0
        return Forecast(
            short, now, predicted, middle, max(middle, base * window.quantile(kind.level))
        )

    def observe(self, forecast: Forecast, now: float) -> None:
        """The first token of that request was made at ``now``."""
        self._classes[forecast.short].add(forecast, max(0.0, now - forecast.made))

    def gave_up(self, forecast: Forecast, now: float) -> None:
        """Note that a request left without a first token.

        That says nothing about its wait, unless it had waited for longer than predicted. Then the
        time so far is counted as its wait, as a lower bound. Otherwise an overload in which all
        clients lose patience would teach nothing.
        """
        if now - forecast.made > forecast.median:
            self.observe(forecast, now)

    def error(self, short: bool) -> float:
        """Median relative error of the last forecasts' ``median``; 0 before the first."""
        return _middle(self._classes[short].errors)

    def raw_error(self, short: bool) -> float:
        """Median relative error of the policy's own predictions; 0 before the first."""
        return _middle(self._classes[short].raw_errors)

    def coverage(self, short: bool) -> float:
        """Share of the last first tokens that came by their ``upper``; COVERAGE before any."""
        hits = self._classes[short].hits
        return sum(hits) / len(hits) if hits else COVERAGE


class _Class:
    """All that was seen of shorts, or of longs."""

    def __init__(self) -> None:
        self.level = COVERAGE
        self.errors: deque[float] = deque(maxlen=RECENT)
        self.raw_errors: deque[float] = deque(maxlen=RECENT)
        self.hits: deque[bool] = deque(maxlen=4 * RECENT)
        self._all = RatioWindow()
        self._groups: dict[int, RatioWindow] = {}
        self._seen_at: dict[int, int] = {}
        self._count = 0

    def window(self, group: int) -> RatioWindow | None:
        """Ratios that correct a prediction of this group: O(groups), a few dozen."""
        own = self._groups.get(group)
        if own is not None and len(own) >= LEAST and self._fresh(group):
            return own
        near = [
            other
            for other, window in self._groups.items()
            if len(window) >= LEAST and self._fresh(other)
        ]
        if near:
            return self._groups[min(near, key=lambda other: (abs(other - group), other))]
        return self._all if len(self._all) >= LEAST else None

    def _fresh(self, group: int) -> bool:
        return self._count - self._seen_at[group] <= STALE

    def add(self, forecast: Forecast, actual: float) -> None:
        """Learn what came of a forecast."""
        self._count += 1
        if forecast.upper < inf:
            hit = actual <= forecast.upper
            self.hits.append(hit)
            moved = self.level + PACE * (COVERAGE - hit)
            self.level = min(1.0, max(LOWEST_LEVEL, moved))
        group = _group(forecast.predicted)
        ratio = max(actual, BRIEF) / max(forecast.predicted, BRIEF)
        self._groups.setdefault(group, RatioWindow()).add(ratio)
        self._seen_at[group] = self._count
        self._all.add(ratio)
        self.errors.append(_relative(forecast.median, actual))
        self.raw_errors.append(_relative(forecast.predicted, actual))


def _group(predicted: float) -> int:
    return round(log2(max(predicted, BRIEF)))


def _relative(said: float, actual: float) -> float:
    return abs(said - actual) / max(actual, BRIEF)


def _middle(values: deque[float]) -> float:
    return median(values) if values else 0.0
