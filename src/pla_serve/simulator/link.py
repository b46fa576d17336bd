"""The router's link to a simulated instance, on virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pla_serve.fleet.link.protocol import (
    Inbound,
    InstanceFacts,
    InstanceReport,
    LinkDown,
    LinkEvents,
    LossCause,
    RequestAnswer,
    Role,
)


class VirtualLink:
    """Implements `Link`: what is sent arrives at once, and so does what the instance answers.

    Connections are made and broken by `connect` and `cut`, so that there is nothing to `run`.

    Args:
        owner: called with connections, reports and messages.
        receive: the instance's side of `send`.
        change_role: the instance's side of `set_role`.
        change_draining: the instance's side of `drain`.
    """

    def __init__(
        self,
        url: str,
        owner: LinkEvents,
        receive: Callable[[Inbound], None],
        change_role: Callable[[Role], None],
        change_draining: Callable[[bool], None],
    ) -> None:
        self._url = url
        self._owner = owner
        self._receive = receive
        self._change_role = change_role
        self._change_draining = change_draining
        self._connected = False
        self._facts: InstanceFacts | None = None
        self._last_report: InstanceReport | None = None

    @property
    def url(self) -> str:
        """Name of the instance."""
        return self._url

    @property
    def connected(self) -> bool:
        """Whether messages can be sent: from `connect` to `cut`."""
        return self._connected

    @property
    def facts(self) -> InstanceFacts | None:
        """Facts of the last connection."""
        return self._facts

    @property
    def last_report(self) -> InstanceReport | None:
        """Last report of this connection."""
        return self._last_report

    def send(self, message: Inbound) -> None:
        """Give the instance a message.

        Raises:
            LinkDown: not connected.
        """
        if not self._connected:
            raise LinkDown(f"{self._url} is not connected")
        self._receive(message)

    def set_role(self, role: Role) -> None:
        """Give the instance a role, which it keeps over failures."""
        self._change_role(role)

    def drain(self, on: bool) -> None:
        """Ask the instance to be given nothing new, or end that."""
        self._change_draining(on)

    async def run(self) -> None:
        """Do nothing: virtual connections are made by `connect`."""

    async def close(self) -> None:
        """Do nothing: virtual connections are broken by `cut`."""

    # The instance's side

    def connect(self, facts: InstanceFacts) -> None:
        """Make a connection."""
        self._connected, self._facts, self._last_report = True, facts, None
        self._owner.connected(self, facts)

    def cut(self, reason: str, cause: LossCause = LossCause.BROKEN) -> None:
        """Break the connection; the router moves the requests."""
        self._connected, self._last_report = False, None
        self._owner.lost(self, reason, cause)

    def report(self, report: InstanceReport) -> None:
        """Deliver a report; ignored without a connection."""
        if self._connected:
            self._last_report = report
            self._owner.report(self, report)

    def deliver(self, messages: Sequence[RequestAnswer]) -> None:
        """Deliver messages in order, as long as there is a connection."""
        for message in messages:
            if not self._connected:
                return
            self._owner.message(self, message)
