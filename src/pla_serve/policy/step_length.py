"""Bounds the length of steps of long prefills on an engine that cannot be left within a step.

A short prompt that arrives waits for the step under way. Shorter steps spare it time, and cost
every long the launches that they add. Two rules, the longer step of which counts:

- *Balance.* Shorts arrive at rate r and wait c / 2 each for a step of c seconds; a step costs each
  of n longs a launch f. That is ``r * c / 2 + n * f / c`` request-seconds a second, least at
  ``c = sqrt(2 f n / r)``. So steps are long where shorts are rare, or many longs wait.
- *Spare time.* What small steps add may take only a part of the time that the machine would
  otherwise be idle.
"""

from __future__ import annotations

from math import inf, sqrt

from pla_serve.policy.chunking import timed_chunk
from pla_serve.policy.cost import CostModel
from pla_serve.policy.waiting import ArrivalRate

SPARE_SHARE = 0.2
"""Share of the spare time that may go to launches that small steps add. More of it is better for
shorts, and worse for longs."""
LEAST_OVERHEAD = 0.02
"""Least share of a step that launches may take: on a machine that has no time to spare."""
MOST_OVERHEAD = 0.15
LEAST_TOKENS = 32
MEMORY = 60.0
"""Seconds over which rates are averaged."""
LEAST_SHORTS = 2
"""Arrivals before there is a rate of shorts."""


class StepLength:
    """Watches arrivals and steps; says how many tokens of a long prefill fit one step.

    Args:
        most_seconds: a further limit on a step while shorts come; None sets none.
        spare_share: of the spare time, for launches that small steps add; 0 to 1.
    """

    def __init__(
        self,
        cost: CostModel,
        most_seconds: float | None = None,
        spare_share: float = SPARE_SHARE,
    ) -> None:
        self._cost = cost
        self._spare_share = spare_share
        self._most = inf if most_seconds is None else most_seconds
        self._shorts = ArrivalRate(MEMORY, LEAST_SHORTS)
        self._busy = ArrivalRate(MEMORY)
        self._launches = ArrivalRate(MEMORY)

    def short_arrived(self, now: float) -> None:
        """A short prefill came."""
        self._shorts.arrived(now)

    def ran(self, now: float, seconds: float, long: bool) -> None:
        """A step took ``seconds``; ``long`` if it was a part of a long prefill."""
        self._busy.arrived(now, seconds)
        self._launches.arrived(now, self._cost.profile.per_launch if long else 0.0)

    def seconds(self, now: float, longs: int) -> float:
        """Most seconds of a step of long work; infinite while no shorts come.

        Args:
            longs: that wait or are under way.
        """
        rate = self._shorts.rate(now)
        if rate <= 0:
            return inf
        launch = self._cost.profile.per_launch
        balanced = sqrt(2 * launch * max(1, longs) / rate)
        return min(self._most, max(balanced, launch / self.overhead(now)))

    def overhead(self, now: float) -> float:
        """Share of a step that launches may take."""
        spare = 1 - self._busy.rate(now) + self._launches.rate(now)
        return min(MOST_OVERHEAD, max(LEAST_OVERHEAD, self._spare_share * spare))

    def tokens(self, seconds: float, history: int) -> int | None:
        """Most tokens on top of ``history`` that one step of ``seconds`` holds, at least
        LEAST_TOKENS; None if any number."""
        tokens = timed_chunk(self._cost.profile, history, seconds)
        return None if tokens == inf else max(LEAST_TOKENS, int(tokens))
