"""One instance as the router sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pla_serve.fleet.link.protocol import InstanceFacts, InstanceReport, Link, Role
from pla_serve.fleet.router.circuit import Circuit
from pla_serve.policy.pools.protocol import Pool

if TYPE_CHECKING:
    from pla_serve.fleet.router.routed_request import RoutedRequest


@dataclass(slots=True, eq=False)
class FleetInstance:
    """Its link, its circuit, and what is in flight there."""

    link: Link
    circuit: Circuit
    name: str
    facts: InstanceFacts | None = None
    report: InstanceReport | None = None
    """The last one of this connection."""
    boot: str = ""
    epoch: int = 0
    """How often it was connected."""
    connected: bool = False
    unfit: str = ""
    """Why it must not serve, although it is there."""
    last_loss: str = ""
    flights: dict[str, RoutedRequest] = field(default_factory=dict)
    """By their names there: requests whose tokens come from it, or will."""

    @property
    def role(self) -> Role:
        return self.report.role if self.report else "mixed"

    @property
    def pool(self) -> Pool:
        return Pool(self.role)

    @property
    def open(self) -> bool:
        """It takes new requests, as far as it says itself."""
        report = self.report
        return (
            self.connected
            and not self.unfit
            and (report is None or (report.ready and not report.draining))
        )

    def lost(self, reason: str) -> None:
        """The connection has ended; what was in flight is for the caller to move."""
        self.connected = False
        self.report = None
        self.last_loss = reason
