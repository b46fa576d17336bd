"""Shortest remaining prefill first, aged: a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.queues import SortedQueue, aged_rank


@dataclass(frozen=True, slots=True)
class SrptOptions:
    """Raises:
    ValueError: ``aging`` is out of range.
    """

    aging: float = 1.0
    """Seconds of remaining work that one second of waiting outweighs. At 0 it is the textbook's
    order, in which a long prefill may be passed by shorter ones for ever."""

    def __post_init__(self) -> None:
        if not 0 <= self.aging < inf:
            raise ValueError(f"aging must be finite and at least 0, not {self.aging}")


def srpt(
    config: PolicyConfig, cost: CostModel, options: SrptOptions | None = None
) -> ContinuousBatching:
    """Priority, then the least predicted time left less ``aging`` times the time waited.

    Deadlines are not used.
    """
    aging = (options or SrptOptions()).aging
    return ContinuousBatching(config, cost, SortedQueue(aged_rank(aging)))
