"""Decides when short prefills at a layer boundary wait for the next one to arrive."""

from __future__ import annotations

from math import inf

from pla_serve.policy.cost import CostModel
from pla_serve.policy.pending import Pending
from pla_serve.policy.waiting import GainWindow, WaitOptions, linear_curve, rounded


class ExpressWindow:
    """`GainWindow` over the shorts that are pending while longs wait.

    Each batch of shorts makes every long wait for a launch, and two shorts that share one make
    them wait for one less. Where arrivals are rare, or nobody else waits, the window is zero.

    Args:
        longest_wait: seconds for which a short may be held back; 0 never holds one.
    """

    def __init__(self, cost: CostModel, longest_wait: float) -> None:
        self._cost = cost
        self._window = GainWindow(WaitOptions(longest_wait)) if longest_wait > 0 else None

    def arrived(self, now: float) -> None:
        """A short arrived."""
        if self._window is not None:
            self._window.arrived(now)

    def prepare(self) -> None:
        """Make plans that decisions missed; milliseconds now and then."""
        if self._window is not None:
            self._window.prepare()

    def holds(self, first: Pending, pending: int, others: int, now: float) -> bool:
        """Whether to let the running long go on.

        Args:
            first: the short that goes first; the others are taken to be like it.
            pending: shorts that wait.
            others: longs that wait or run.
        """
        if self._window is None:
            return False
        alone = rounded(first.seconds)
        each = alone - min(alone, rounded(self._cost.profile.per_launch))
        until = self._window.until(
            now,
            pending,
            first.arrival,
            linear_curve(alone, each),
            due=inf if first.deadline is None else first.deadline,
            others=others,
        )
        return until is not None
