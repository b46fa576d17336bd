"""The router's side of one instance, whatever kind of server that is."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from pla_serve.wire.engine import Inbound, RequestAnswer
from pla_serve.wire.link import InstanceFacts, InstanceReport, Role

__all__ = [
    "Inbound",
    "InstanceFacts",
    "InstanceReport",
    "Link",
    "LinkDown",
    "LinkEvents",
    "LinkRefused",
    "LossCause",
    "RequestAnswer",
    "Role",
]

LIVENESS_SECONDS = 2.0
"""Default silence in seconds after which an instance counts as lost."""


class LinkDown(Exception):
    """There is no connection to send on. The message names the instance and the cause."""


class LinkRefused(Exception):
    """The instance refuses this router for good: wrong key, or another protocol.

    The message names the cure.
    """


class LossCause(StrEnum):
    """Cause of a loss, as far as the link knows it."""

    ENDED = "ended"
    """The engine has ended, with everything in it."""
    SILENT = "silent"
    """Nothing was heard for too long; the engine may be there."""
    BROKEN = "broken"
    """The connection ended; the engine may be there."""


class LinkEvents(Protocol):
    """Events of a link, called on the event loop, in order. None of these may block or raise.

    For each link: ``connected``, then any number of ``report`` and ``message``, then ``lost``, and
    so on from the start. No event comes in between.
    """

    def connected(self, link: Link, facts: InstanceFacts) -> None:
        """Note that requests can be sent.

        If ``facts.boot`` has changed, the engine has restarted and its KV cache is empty.
        """

    def report(self, link: Link, report: InstanceReport) -> None:
        """Receive a report.

        Instances of ours send one at least every `REPORT_SECONDS`; other servers are polled.
        """

    def lost(self, link: Link, reason: str, cause: LossCause) -> None:
        """Note that the connection has ended, and place all of its requests again.

        The instance drops them as soon as it learns of the loss.
        """

    def message(self, link: Link, message: RequestAnswer) -> None:
        """Receive an answer to a request that was sent on this link since ``connected``.

        After `AbortRequest` was sent, answers with that id may still come for a moment.
        """


class Link(Protocol):
    """Connection to one instance, which is made again whenever it is lost.

    All methods belong to one event loop; `run` must be running.
    """

    @property
    def url(self) -> str:
        """Base URL of the instance, without a slash at the end; its name in metrics and logs."""

    @property
    def connected(self) -> bool:
        """Whether requests can be sent: from ``LinkEvents.connected`` to ``lost``."""

    @property
    def facts(self) -> InstanceFacts | None:
        """Facts of the last connection; None before the first one."""

    @property
    def last_report(self) -> InstanceReport | None:
        """Last report of this connection; None before its first report."""

    def send(self, message: Inbound) -> None:
        """Send a message to the instance; never blocks.

        Times in ``message`` are on this process's monotonic clock. If a server of another kind
        lacks what a request asks for, the answer is `Rejected` without ``retry_after``, and its
        reason names what is missing.

        Raises:
            LinkDown: there is no connection.
        """

    def set_role(self, role: Role) -> None:
        """Set the role of the instance, now or as soon as there is a connection.

        Reports confirm the role.
        """

    def drain(self, on: bool) -> None:
        """Ask all routers to send nothing new there, or end that. Reports confirm it."""

    async def run(self) -> None:
        """Keep the instance connected until cancelled or closed.

        Raises:
            LinkRefused: the instance refuses this router, so trying again soon is pointless.
        """

    async def close(self) -> None:
        """End `run` and the connection; the instance drops what is in flight."""
