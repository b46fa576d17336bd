"""Estimates the arrival rate of work, in seconds of prefill a second: the load in instances."""

from __future__ import annotations

from math import exp, inf, isfinite, sqrt

SLOTS = 4
"""Parts of a control period that are counted apart, to tell a burst from a higher rate."""
SURPRISE = 3.0
"""A period as unlikely as so many standard deviations makes the past be forgotten."""


class WorkRate:
    """Arrival rate of work: an average with a fading past, which a step makes it forget.

    Work arrives in jobs of random size at random times, so the work of a period of length t is a
    compound Poisson sum with mean ``rate * t`` and variance ``squares * t``, where ``squares`` is
    the arrival rate of squared job sizes. If a period is farther from that than noise is, the rate
    has changed, and the average starts again from that period *without the busiest quarter of it*.
    So one clump of work, which is in the queues anyway, is not taken for a rate that lasts.

    Noise is what Bernstein's inequality leaves: a sum of jobs of at most b exceeds its mean by x
    with a probability below ``exp(-x^2 / 2 (variance + b x / 3))``. The variance is the past's, so
    a dozen jobs where three were usual are believed at once, and one large job among them is not.

    Args:
        memory_seconds: time in which the weight of the past falls to 1/e.

    Raises:
        ValueError: ``memory_seconds`` is not positive and finite.
    """

    def __init__(self, memory_seconds: float) -> None:
        if not 0 < memory_seconds < inf:
            raise ValueError(f"memory_seconds must be positive and finite, not {memory_seconds}")
        self._memory = memory_seconds
        self._jobs: list[tuple[float, float]] = []
        self._closed_at: float | None = None
        self._work = 0.0
        self._squares = 0.0
        self._weight = 0.0
        """Faded seconds behind the two sums; dividing by it makes the first average unbiased."""

    def add(self, seconds: float, now: float) -> None:
        """A job of this size arrived.

        Raises:
            ValueError: ``seconds`` is negative or not finite.
        """
        if not (isfinite(seconds) and seconds >= 0):
            raise ValueError(f"seconds must be finite and at least 0, not {seconds}")
        if self._closed_at is None:
            self._closed_at = now
        self._jobs.append((now, seconds))

    def close(self, now: float) -> float:
        """End a control period and return the rate: seconds of work a second, thus instances."""
        if self._closed_at is None:
            self._closed_at = now
        length = now - self._closed_at
        if length > 0:
            self._take(length, now)
        return self.rate

    @property
    def rate(self) -> float:
        """Seconds of work a second, as of the last `close`."""
        return self._work / self._weight if self._weight else 0.0

    def _take(self, length: float, now: float) -> None:
        work = sum(seconds for _, seconds in self._jobs)
        squares = sum(seconds * seconds for _, seconds in self._jobs)
        if self._surprising(work, length):
            work, squares, length = self._without_busiest_slot(length, now)
            self._work = self._squares = self._weight = 0.0
        fade = exp(-length / self._memory)
        gain = self._memory * (1 - fade) / length
        self._work = fade * self._work + gain * work
        self._squares = fade * self._squares + gain * squares
        self._weight = fade * self._weight + gain * length
        self._jobs.clear()
        self._closed_at = now

    def _surprising(self, work: float, length: float) -> bool:
        if not self._weight:
            return False
        more = work - self.rate * length
        variance = self._squares / self._weight * length
        if more > 0:
            variance += max(seconds for _, seconds in self._jobs) * more / 3
        return abs(more) > SURPRISE * sqrt(variance) + 1e-12

    def _without_busiest_slot(self, length: float, now: float) -> tuple[float, float, float]:
        slot = length / SLOTS
        work, squares = [0.0] * SLOTS, [0.0] * SLOTS
        for time, seconds in self._jobs:
            place = min(max(int((time - (now - length)) / slot), 0), SLOTS - 1)
            work[place] += seconds
            squares[place] += seconds * seconds
        busiest = max(range(SLOTS), key=work.__getitem__)
        return sum(work) - work[busiest], sum(squares) - squares[busiest], length - slot
