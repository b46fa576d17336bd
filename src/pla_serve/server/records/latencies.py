"""Times to first tokens and between tokens of the last seconds, by class, for the page at /ui."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Literal

LEAST_SECONDS = 1e-5
"""Shorter times count as this one."""
STEP = 1.05
"""Ratio of a bucket's upper edge to its lower one: a quantile is at most 5% too large."""
BUCKETS = 420
"""Buckets reach to some 8,000 seconds; longer times count as that."""
SLOTS = 20
"""Periods that a window covers."""

RequestClass = Literal["short", "long"]


class SlidingQuantiles:
    """Quantiles of the times of the last `SLOTS` periods. Memory does not grow with their number.

    Example::

        times = SlidingQuantiles()
        times.add(0.2)
        times.summary()  # (1, 0.2, 0.2), each at most 5% more
        times.advance()  # a period is over
    """

    def __init__(self) -> None:
        self._slots: deque[Counter[int]] = deque([Counter()], maxlen=SLOTS)
        self._total: Counter[int] = Counter()

    def add(self, seconds: float) -> None:
        """Count one time, in the period that runs."""
        ratio = max(1.0, seconds / LEAST_SECONDS)
        bucket = min(BUCKETS, math.ceil(math.log(ratio) / math.log(STEP)))
        self._slots[-1][bucket] += 1
        self._total[bucket] += 1

    def advance(self) -> None:
        """Begin a period, and forget the oldest one."""
        if len(self._slots) == SLOTS:
            self._total -= self._slots[0]
        self._slots.append(Counter())

    def summary(self) -> tuple[int, float | None, float | None]:
        """Return how many times were counted, their median and their 90th percentile, in seconds.

        Both are None where there were none.
        """
        count = self._total.total()
        return count, self._quantile(count, 0.5), self._quantile(count, 0.9)

    def _quantile(self, count: int, share: float) -> float | None:
        left = max(1, math.ceil(share * count))
        for bucket in sorted(self._total):
            left -= self._total[bucket]
            if left <= 0:
                return float(LEAST_SECONDS * STEP**bucket)
        return None


class RecentLatencies:
    """TTFT and ITL as the server sees them, by class. Counts only while somebody watches.

    A request is short if it has at most `boundary_tokens` new tokens, as its instance found them.
    """

    def __init__(self) -> None:
        self.boundary_tokens = 0
        """L_m, as last reported; 0 before."""
        self._series: dict[tuple[RequestClass, str], SlidingQuantiles] | None = None

    @property
    def counting(self) -> bool:
        """Whether somebody watches."""
        return self._series is not None

    def start(self) -> None:
        """Count from now on."""
        self._series = {
            (kind, name): SlidingQuantiles() for kind in _CLASSES for name in ("ttft", "itl")
        }

    def stop(self) -> None:
        """Count nothing, and forget what was counted."""
        self._series = None

    def first_token(self, seconds: float, new_tokens: int) -> None:
        """Count the time from arrival to the first token of a choice."""
        if self._series is not None:
            self._series[self._class(new_tokens), "ttft"].add(seconds)

    def next_tokens(self, seconds_each: float, new_tokens: int) -> None:
        """Count the mean time between tokens that came together."""
        if self._series is not None:
            self._series[self._class(new_tokens), "itl"].add(seconds_each)

    def summary(self) -> dict[str, dict[str, tuple[int, float | None, float | None]]]:
        """Return count, P50 and P90 by class and name, and begin the next period."""
        if self._series is None:
            return {}
        found: dict[str, dict[str, tuple[int, float | None, float | None]]] = {}
        for (kind, name), times in self._series.items():
            found.setdefault(kind, {})[name] = times.summary()
            times.advance()
        return found

    def _class(self, new_tokens: int) -> RequestClass:
        return "short" if new_tokens <= self.boundary_tokens else "long"


_CLASSES: tuple[RequestClass, ...] = ("short", "long")
