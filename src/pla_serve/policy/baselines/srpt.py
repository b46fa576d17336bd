"""Shortest remaining prefill first, aged: a baseline."""

from __future__ import annotations

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.queues import SortedQueue, aged_rank


def srpt(config: PolicyConfig, cost: CostModel) -> ContinuousBatching:
    """Priority, then the least predicted time left less ``aging`` times the time waited.

    ``aging`` 0 is the textbook's shortest-remaining-first, which can starve. Deadlines are not
    used.
    """
    return ContinuousBatching(config, cost, SortedQueue(aged_rank(config.aging)))
