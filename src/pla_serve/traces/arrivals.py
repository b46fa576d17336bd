"""Arrival processes."""

from __future__ import annotations

import random
from dataclasses import dataclass


def poisson(count: int, rate: float, burst: int, rng: random.Random) -> list[float]:
    """Draw ``count`` arrival times in seconds, the first at 0.

    Bursts of ``burst`` arrivals at the same moment form a Poisson process, with ``rate`` arrivals a
    second in all.
    """
    times: list[float] = []
    now = 0.0
    while len(times) < count:
        times += [now] * min(burst, count - len(times))
        now += rng.expovariate(rate / burst)
    return times


@dataclass(frozen=True, slots=True)
class Bursts:
    """A Poisson process whose rate switches between a quiet one and ``factor`` times that one.

    This is a Markov-modulated Poisson process with two states, which last exponential times.

    Raises:
        ValueError: a field is out of range.
    """

    factor: float = 10.0
    quiet_seconds: float = 300.0
    """Mean duration of the quiet state."""
    burst_seconds: float = 30.0
    """Mean duration of the other state."""

    def __post_init__(self) -> None:
        if not (self.factor > 0 and self.quiet_seconds > 0 and self.burst_seconds > 0):
            raise ValueError("factor, quiet and burst of a bursty process must be positive")

    def times(self, count: int, rate: float, rng: random.Random) -> list[float]:
        """Draw ``count`` arrival times in seconds, from the start of a quiet state.

        In the long run there are ``rate`` arrivals a second.
        """
        durations = (self.quiet_seconds, self.burst_seconds)
        quiet_rate = rate * sum(durations) / (durations[0] + self.factor * durations[1])
        rates = (quiet_rate, quiet_rate * self.factor)
        times: list[float] = []
        now, state = 0.0, 0
        until = rng.expovariate(1 / durations[state])
        while len(times) < count:
            # A Poisson process has no memory, so a gap may be drawn again when the rate changes.
            after = now + rng.expovariate(rates[state])
            if after < until:
                now = after
                times.append(now)
                continue
            now, state = until, 1 - state
            until = now + rng.expovariate(1 / durations[state])
        return times
