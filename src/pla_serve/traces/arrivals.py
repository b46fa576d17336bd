"""Arrival processes."""

from __future__ import annotations

import random
from dataclasses import dataclass


def poisson(count: int, rate: float, burst: int, rng: random.Random) -> list[float]:
    """``count`` times in seconds, from 0: a Poisson process of bursts of ``burst`` arrivals at the
    same moment, ``rate`` arrivals a second."""
    times: list[float] = []
    now = 0.0
    while len(times) < count:
        times += [now] * min(burst, count - len(times))
        now += rng.expovariate(rate / burst)
    return times


@dataclass(frozen=True, slots=True)
class Bursts:
    """A Poisson process whose rate switches between quiet and ``factor`` times that (a
    Markov-modulated Poisson process with two states, exponential stays).

    Raises:
        ValueError: a field is out of range.
    """

    factor: float = 10.0
    quiet_seconds: float = 300.0
    """Mean stay; ``burst_seconds`` likewise."""
    burst_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.quiet_seconds > 0 and self.burst_seconds > 0):
            raise ValueError("factor, quiet and burst of a bursty process must be positive")

    def times(self, count: int, rate: float, rng: random.Random) -> list[float]:
        """``count`` times in seconds, from the start of a quiet stay; ``rate`` a second in the
        long run."""
        stays = (self.quiet_seconds, self.burst_seconds)
        quiet_rate = rate * sum(stays) / (stays[0] + self.factor * stays[1])
        rates = (quiet_rate, quiet_rate * self.factor)
        times: list[float] = []
        now, state = 0.0, 0
        until = rng.expovariate(1 / stays[state])
        while len(times) < count:
            # Without memory, what is left of a gap may be drawn again when the rate changes.
            after = now + rng.expovariate(rates[state])
            if after < until:
                now = after
                times.append(now)
                continue
            now, state = until, 1 - state
            until = now + rng.expovariate(1 / stays[state])
        return times
