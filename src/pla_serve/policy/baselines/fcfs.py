"""First come, first served, as vLLM does it: the usual baseline."""

from __future__ import annotations

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import CONTINUOUS_SETTINGS, PolicyKind
from pla_serve.policy.pending import Pending
from pla_serve.policy.queues import SortedQueue, arrival_rank


class ArrivalQueue(SortedQueue):
    """Priority, then prefills under way, then arrival."""

    def __init__(self) -> None:
        super().__init__(arrival_rank)

    def seconds_ahead(self, request: Pending, total: float) -> float:
        return total


def fcfs(config: PolicyConfig, cost: CostModel) -> ContinuousBatching:
    """Decode steps first, then prefill chunks in order of arrival, prefills under way foremost.

    ``long_chunk_tokens`` is vLLM's ``--long-prefill-token-threshold``, ``max_batch_tokens`` its
    ``--max-num-batched-tokens``. Deadlines are not used.
    """
    return ContinuousBatching(config, cost, ArrivalQueue())


POLICY = PolicyKind(
    name="fcfs",
    summary="first come, first served, as in vLLM",
    make=fcfs,
    settings=CONTINUOUS_SETTINGS,
)
