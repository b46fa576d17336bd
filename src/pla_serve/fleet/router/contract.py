"""What the fleet is told at start, and whom it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pla_serve.fleet.link.protocol import InstanceReport, Link
from pla_serve.fleet.router.circuit import CircuitOptions
from pla_serve.fleet.router.routed_request import Attempt, Timer

Later = Callable[[float, Callable[[], None]], Timer]
"""Call a function after so many seconds."""


class RoutingObserver(Protocol):
    """What the metrics are told."""

    def decided(self, seconds: float) -> None:
        """A routing decision took so long."""

    def dispatched(self, instance: str, short: bool, seconds: float, now: float) -> None:
        """A request was sent there, with so many seconds of predicted prefill."""

    def began(
        self, attempt: Attempt, cached_tokens: int | None, lateness: float | None, now: float
    ) -> None:
        """The first token came from there; so many tokens of the prompt were cached.

        Args:
            lateness: seconds after its deadline, negative before it; None without one.
        """

    def reported(self, link: Link, report: InstanceReport) -> None:
        """A heartbeat came."""

    def gone(self, link: Link) -> None: ...

    def moved(self, instance: str, reason: str, resumed: bool) -> None:
        """A request left an instance that failed or refused it, to go elsewhere.

        Args:
            reason: lost, error or refused.
            resumed: its client has got tokens.
        """

    def refused(self, reason: str) -> None:
        """The fleet gave up on a request, or did not take it: capacity, share or failures."""

    def handed_over(self, outcome: str) -> None:
        """A hand-over ended: begun, or recomputed and why."""


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """Raises:
    ValueError: a field is out of range.
    """

    circuit: CircuitOptions = field(default_factory=CircuitOptions)
    max_predicted_wait: float | None = None
    """Seconds; beyond, a request is taken only if its key asks for less than its share."""
    most_failures: int = 4
    """So many instances may fail one request, without a token from it in between, before its client
    is told. (A request may be what they fail of.)"""
    patience_seconds: float = 60.0
    """How long a request may be without an instance that takes it."""
    lease_seconds: float = 5.0
    """How long KV is kept for a hand-over that makes no progress."""

    def __post_init__(self) -> None:
        if self.max_predicted_wait is not None and not self.max_predicted_wait > 0:
            raise ValueError(f"max_predicted_wait must be positive, not {self.max_predicted_wait}")
        if self.most_failures < 1:
            raise ValueError(f"most_failures must be at least 1, not {self.most_failures}")
        if not self.patience_seconds >= 0:
            raise ValueError(f"patience must not be negative, not {self.patience_seconds}")
        if not self.lease_seconds > 0:
            raise ValueError(f"a lease must be positive, not {self.lease_seconds}")
