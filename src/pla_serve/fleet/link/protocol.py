"""The router's side of one instance, whatever kind of server that is."""

from __future__ import annotations

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
    "RequestAnswer",
    "Role",
]

LIVENESS_SECONDS = 2.0
"""Silence after which an instance is held to be lost, unless told otherwise."""


class LinkDown(Exception):
    """There is no connection to send on. The message names the instance and the cause."""


class LinkRefused(Exception):
    """The instance will never let this router in: wrong key, another protocol. Names the cure."""


class LinkEvents(Protocol):
    """Events of a link, called on the event loop, in order. None of these may block or raise.

    For each link: ``connected``, then any number of ``report`` and ``message``, then ``lost``, and
    so on from the start. No event comes in between.
    """

    def connected(self, link: Link, facts: InstanceFacts) -> None:
        """Requests can be sent. A ``boot`` other than the last one: its KV cache is empty."""

    def report(self, link: Link, report: InstanceReport) -> None:
        """At least every `REPORT_SECONDS`, from our own instances; the others are polled."""

    def lost(self, link: Link, reason: str) -> None:
        """Every request on it is the owner's to move; the instance drops them when it can."""

    def message(self, link: Link, message: RequestAnswer) -> None:
        """An answer to a request that was sent on this link since ``connected``.

        After `AbortRequest` was sent, answers with that id may still come for a moment.
        """


class Link(Protocol):
    """All methods belong to one event loop; `run` must be running."""

    @property
    def url(self) -> str:
        """Base URL of the instance, without a slash at the end; its name in metrics and logs."""

    @property
    def connected(self) -> bool:
        """Between ``LinkEvents.connected`` and ``lost``."""

    @property
    def facts(self) -> InstanceFacts | None:
        """Last known facts; None until it was connected once."""

    @property
    def last_report(self) -> InstanceReport | None:
        """Last report since it is connected; None before the first."""

    def send(self, message: Inbound) -> None:
        """Never blocks. ``arrival`` and ``deadline`` are on this process's monotonic clock.

        What an instance of another kind cannot do is answered by `Rejected`, without
        ``retry_after`` and by name.

        Raises:
            LinkDown: not connected.
        """

    def set_role(self, role: Role) -> None:
        """Also while it is down: it is told when it is back. Reports confirm it."""

    def drain(self, on: bool) -> None:
        """Ask all routers to send nothing new there, or end that. Reports confirm it."""

    async def run(self) -> None:
        """Connect, and again whenever the connection ends, until cancelled or `close`.

        Raises:
            LinkRefused: there is no point in trying again soon.
        """

    async def close(self) -> None:
        """End `run` and the connection; the instance drops what is in flight."""
