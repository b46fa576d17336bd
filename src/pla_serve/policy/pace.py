"""Predicts how fast a stream would get its tokens, before it is admitted."""

from __future__ import annotations

from math import ceil

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.decodes import LOOSE_TARGET, DecodePool


def step_pace(
    pool: DecodePool,
    config: PolicyConfig,
    cost: CostModel,
    context: int,
    tpot: float,
    default: float = LOOSE_TARGET,
) -> float:
    """Return the seconds from token to token of one stream more, if only decode steps run.

    With all streams of the pool that have places in a batch, it makes one step after another. Where
    places are short, those whose target is longer give way to it (`DecodePool.take`).

    Args:
        context: its cached tokens.
        tpot: its target in seconds.
        default: the target of streams that have none of their own.
    """
    streams = pool.total + 1
    places = min(config.max_batch_requests, config.max_batch_tokens)
    size = min(streams, places)
    read = size * (pool.context + context) / streams
    step = cost.work_seconds(size, read, read + size, size, 1)
    if streams <= places:
        return step
    return step * ceil((pool.within(tpot, default) + 1) / places)
