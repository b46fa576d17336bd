"""Says whether shorts wait for clients that answer the batch that has just ended.

A client that sends its next request as soon as it has the last answer comes back the moment a batch
ends, and just too late for the batch that begins at that moment. Two such clients then take turns
for ever, each alone in a launch. A wait of a small part of a launch brings them together.
"""

from __future__ import annotations

from math import inf

from pla_serve.policy.cost import CostModel

WINDOW = 1 / 16
"""The wait, as a share of the time of a launch."""
MEMORY = 32
"""Batches over which the share of answers that a short follows at once is averaged."""
LEAST_SEEN = 16
"""Batches that have to be seen before that share is used."""


class EchoWindow:
    """Counts the short prefills that arrive within a small part of a launch after a batch ends."""

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._ended = -inf
        self._answers = 0
        self._came = 0
        self._seen = 0
        self._share = 0.0

    def ended(self, now: float, answers: int) -> None:
        """Note that a batch has ended that gave ``answers`` requests their first token."""
        if not answers:
            return
        if self._answers:
            share = min(1.0, self._came / self._answers)
            self._seen += 1
            self._share += (share - self._share) / min(self._seen, MEMORY)
        self._ended, self._answers, self._came = now, answers, 0

    def arrived(self, now: float) -> None:
        """Note that a short prefill has arrived."""
        if now < self._until:
            self._came += 1

    def until(self, now: float, pending: int) -> float | None:
        """Return the time until which ``pending`` shorts wait for those to come; None to go now.

        Each that comes saves itself the wait for a launch; the pending ones lose the wait, and what
        the others bring along, which is little for shorts.
        """
        until, missing = self._until, self._share * self._answers - self._came
        if now >= until or missing <= 0 or self._seen < LEAST_SEEN:
            return None
        gain = missing * self._cost.profile.per_launch
        return until if gain > 2 * pending * (until - now) else None

    @property
    def _until(self) -> float:
        return self._ended + WINDOW * self._cost.profile.per_launch
