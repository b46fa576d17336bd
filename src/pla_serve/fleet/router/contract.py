"""Settings of a fleet behind a router, and the interface of its observers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Protocol

from pla_serve.flags import Flag
from pla_serve.fleet.link.protocol import InstanceReport, Link
from pla_serve.fleet.router.circuit import FAULTS, CircuitOptions
from pla_serve.fleet.router.routed_request import Attempt, Timer
from pla_serve.policy.knobs import Knob, check_knobs

ROUTING = "Routing"

Later = Callable[[float, Callable[[], None]], Timer]
"""Calls a function after so many seconds, unless the timer that it returns is cancelled."""


class RoutingObserver(Protocol):
    """Called with everything that metrics and controllers count."""

    def decided(self, seconds: float) -> None:
        """Count a routing decision, which took ``seconds``."""

    def dispatched(self, instance: str, short: bool, seconds: float, now: float) -> None:
        """Count a request that was sent to ``instance``, with ``seconds`` of predicted prefill."""

    def began(
        self, attempt: Attempt, cached_tokens: int | None, lateness: float | None, now: float
    ) -> None:
        """Count the first token of an attempt; ``cached_tokens`` of the prompt were cached.

        Args:
            lateness: seconds after its deadline, negative before it; None without one.
        """

    def reported(self, link: Link, report: InstanceReport) -> None:
        """Receive a report of an instance."""

    def gone(self, link: Link) -> None: ...

    def moved(self, instance: str, reason: str, resumed: bool) -> None:
        """Count a request that left an instance, which failed or refused it, to go elsewhere.

        Args:
            reason: lost, error or refused.
            resumed: its client has got tokens.
        """

    def refused(self, reason: str) -> None:
        """Count a request that no instance served, by reason: capacity, share or failures."""

    def handed_over(self, outcome: str) -> None:
        """Count a hand-over that has ended, by outcome."""


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """Settings of a fleet behind a router.

    Raises:
        ValueError: a field is out of range.
    """

    circuit: CircuitOptions = field(default_factory=CircuitOptions)
    max_predicted_wait: Annotated[
        float | None,
        Flag(
            "Where requests would wait longer than this, keys that use more than their share are "
            "refused (429); 0: never.",
            unit="seconds",
            above=0,
            panel=ROUTING,
            none=0,
        ),
    ] = None
    most_failures: Annotated[
        int,
        Flag(
            "Instances that may fail one request, without a token from it in between, before its "
            "client is told.",
            unit="instances",
            least=1,
            panel=FAULTS,
            name="--max-failures",
        ),
    ] = 4
    most_lost_engines: Annotated[
        int,
        Knob(
            "Engines that may end with one request, without a token from them in between, before "
            "its client is told.",
            least=1,
        ),
    ] = 2
    patience_seconds: Annotated[
        float, Knob("How long a request may wait for an instance that takes it.", least=0)
    ] = 60.0
    lease_seconds: Annotated[
        float,
        Flag(
            "How long KV is kept for a hand-over that makes no progress.",
            unit="seconds",
            above=0,
            panel=FAULTS,
        ),
    ] = 5.0

    def __post_init__(self) -> None:
        check_knobs(self)
