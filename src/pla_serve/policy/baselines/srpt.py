"""Shortest remaining prefill first, aged: a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pla_serve.policy.baselines.continuous import ContinuousBatching
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import CONTINUOUS_SETTINGS, PolicyKind
from pla_serve.policy.knobs import Knob, check_knobs
from pla_serve.policy.queues import SortedQueue, aged_rank


@dataclass(frozen=True, slots=True)
class SrptOptions:
    """Knobs of `srpt`.

    Raises:
        ValueError: ``aging`` is out of range.
    """

    aging: Annotated[
        float,
        Knob(
            "Seconds of remaining work that one second of waiting outweighs. At 0 it is the "
            "textbook's order, in which shorter prefills may pass a long one for ever.",
            least=0,
        ),
    ] = 1.0

    def __post_init__(self) -> None:
        check_knobs(self)


def srpt(
    config: PolicyConfig, cost: CostModel, options: SrptOptions | None = None
) -> ContinuousBatching:
    """Priority, then the least predicted time left less ``aging`` times the time waited.

    Deadlines are not used.
    """
    aging = (options or SrptOptions()).aging
    return ContinuousBatching(config, cost, SortedQueue(aged_rank(aging)))


POLICY = PolicyKind(
    name="srpt",
    summary="shortest remaining prefill first, aged",
    make=srpt,
    options=SrptOptions,
    settings=CONTINUOUS_SETTINGS,
)
