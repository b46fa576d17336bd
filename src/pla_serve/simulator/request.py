"""Request of a simulation, with the times that it got."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from math import inf, nan

import numpy as np

from pla_serve.policy.protocol import ServiceLevel
from pla_serve.policy.tiers import Tier


def _no_gaps() -> array[float]:
    return array("f")


@dataclass(slots=True, eq=False)
class SimulatedRequest:
    """Times are seconds of virtual time. What follows ``start`` is filled in by the executor."""

    id: str
    arrival: float
    new_tokens: int
    """Prompt tokens to compute, as the cache stands when it is handed to an instance."""
    history: int
    """Prompt tokens whose KV is cached."""
    output_tokens: int = 1
    deadline: float | None = None
    priority: int = 0
    row: int = -1
    """Place in the workload."""
    tpot: float | None = None
    """Its TPOT target in seconds."""
    service: ServiceLevel = ServiceLevel.USUAL
    tier: Tier | None = None
    """The tier whose targets were promised to it, if any."""

    refused: bool = False
    """Whether no instance took it, because its targets would not have been kept."""
    computed: int = 0
    """Tokens whose KV is cached on its instance."""
    produced: int = 0
    first_token: float = nan
    last_token: float = nan
    gaps: array[float] = field(default_factory=_no_gaps)
    """Seconds between its tokens, one for each token after the first, in single precision."""
    finished: float = inf

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the whole prompt."""
        return self.new_tokens + self.history

    @property
    def ttft(self) -> float:
        """Seconds from arrival to first token; NaN before it."""
        return self.first_token - self.arrival

    def promise(self, tier: Tier) -> None:
        """Give it the targets of a tier."""
        self.tier = tier
        self.deadline = None if tier.ttft is None else self.arrival + tier.ttft
        self.tpot, self.service = tier.token_target, tier.service

    def in_time(self, first: float, each: float) -> bool:
        """Return whether all its tokens came by their deadlines (`policy.tokens`).

        Args:
            first: seconds after its arrival at which the first one was due.
            each: seconds after that at which each further one was due after the one before it.
        """
        if self.ttft > first:
            return False
        came = self.ttft + np.cumsum(self.gaps, dtype=np.float64)
        return bool((came <= first + each * np.arange(1, len(came) + 1)).all())

    def token(self, now: float) -> None:
        """Note that its next token was made."""
        if self.first_token != self.first_token:  # NaN: there was none
            self.first_token = now
        else:
            self.gaps.append(now - self.last_token)
        self.last_token = now
