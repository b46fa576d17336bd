"""One instance as the router sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pla_serve.fleet.link.protocol import InstanceFacts, InstanceReport, Link, Role
from pla_serve.fleet.router.circuit import Circuit
from pla_serve.policy.pools.protocol import Pool


@dataclass(slots=True, eq=False)
class FleetInstance:
    """An instance's link and circuit, and the attempts that are under way there."""

    link: Link
    circuit: Circuit
    name: str
    facts: InstanceFacts | None = None
    report: InstanceReport | None = None
    """The last report of this connection."""
    boot: str = ""
    """Name of the engine's life, from its facts; the KV cache ends with it."""
    epoch: int = 0
    """Number of connections so far."""
    connected: bool = False
    unfit: str = ""
    """Reason why the instance must not serve although it is connected; empty if there is none."""
    last_loss: str = ""
    """Reason of the last loss of the connection."""
    attempts: dict[str, str] = field(default_factory=dict)
    """Requests whose messages come from this instance: name there to id of the request."""

    @property
    def role(self) -> Role:
        """Role as last reported; mixed before the first report."""
        return self.report.role if self.report else "mixed"

    @property
    def pool(self) -> Pool:
        """The role as a pool."""
        return Pool(self.role)

    @property
    def open(self) -> bool:
        """Whether the instance takes new requests, as far as it says itself."""
        report = self.report
        return (
            self.connected
            and not self.unfit
            and (report is None or (report.ready and not report.draining))
        )

    def lost(self, reason: str) -> None:
        """Note that the connection has ended; the caller moves the requests."""
        self.connected = False
        self.report = None
        self.last_loss = reason
