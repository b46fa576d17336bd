"""Links and instances of the simulator that fail in every way that the router must survive."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from pla_serve.fleet.link.protocol import (
    LIVENESS_SECONDS,
    Inbound,
    InstanceFacts,
    InstanceReport,
    LinkDown,
    LinkEvents,
    LossCause,
    RequestAnswer,
    Role,
)
from pla_serve.simulator.link import VirtualLink
from pla_serve.simulator.server import SimulatedServer
from pla_serve.simulator.timeline import Timeline
from pla_serve.wire import engine as wire

LATENCY = (0.0, 0.02)
"""Seconds that a message takes."""
LATE_REPORT = 1.5
"""A late report takes up to so many seconds more, and may come after younger ones."""
WATCH_SECONDS = 0.25


class FaultyLink(VirtualLink):
    """Messages take time and keep their order; reports may be late; connections break.

    What is on its way when a connection breaks is lost. A router that hears nothing for
    `LIVENESS_SECONDS` holds the instance to be lost.
    """

    def __init__(self, timeline: Timeline, rng: random.Random, *link: Any) -> None:
        super().__init__(*link)
        self.late_reports = False
        self.silent = False
        """Everything that is sent is lost, in both directions, and nobody is told."""
        self._timeline = timeline
        self._rng = rng
        self._connection = 0
        """Number of the connection; messages of earlier ones are lost."""
        self._there_at = self._back_at = 0.0
        self._last_message = 0.0

    def send(self, message: Inbound) -> None:
        if not self._connected:
            raise LinkDown(f"{self._url} is not connected")
        self._there_at = self._due(self._there_at)
        self._timeline.at(self._there_at, self._receive_if, (self._connection, message))

    def set_role(self, role: Role) -> None:
        super().set_role(role)

    def connect(self, facts: InstanceFacts) -> None:
        self._connection += 1
        self.silent = False
        self._last_message = self._timeline.now
        super().connect(facts)
        self._timeline.at(self._timeline.now + WATCH_SECONDS, self._watch, self._connection)

    def cut(self, reason: str, cause: LossCause = LossCause.BROKEN) -> None:
        self._connection += 1
        if self._connected:
            super().cut(reason, cause)

    def abandon(self) -> None:
        """Break the connection; there is no router any more that could be told."""
        self._connection += 1
        self._connected = False

    def report(self, report: InstanceReport) -> None:
        if self.silent:
            return
        due = self._due(self._back_at)
        if self.late_reports:
            due += self._rng.uniform(0.0, LATE_REPORT)
        self._timeline.at(due, self._report_if, (self._connection, report))

    def deliver(self, messages: Sequence[RequestAnswer]) -> None:
        if not self.silent:
            self._back_at = self._due(self._back_at)
            self._timeline.at(self._back_at, self._deliver_if, (self._connection, messages))

    def _due(self, after: float) -> float:
        return max(after, self._timeline.now + self._rng.uniform(*LATENCY))

    def _receive_if(self, what: tuple[int, Inbound]) -> None:
        connection, message = what
        if connection == self._connection and not self.silent:
            self._receive(message)

    def _deliver_if(self, what: tuple[int, Sequence[RequestAnswer]]) -> None:
        connection, messages = what
        if connection == self._connection and not self.silent:
            self._last_message = self._timeline.now
            super().deliver(messages)

    def _report_if(self, what: tuple[int, InstanceReport]) -> None:
        connection, report = what
        if connection == self._connection and not self.silent:
            self._last_message = self._timeline.now
            super().report(report)

    def _watch(self, connection: int) -> None:
        if connection != self._connection:
            return
        now = self._timeline.now
        if now - self._last_message > LIVENESS_SECONDS:
            self.cut(f"silent for {LIVENESS_SECONDS:g} s", LossCause.SILENT)
        else:
            self._timeline.at(now + WATCH_SECONDS, self._watch, connection)


class FaultyServer(SimulatedServer):
    """An instance that can hang, be full, and fail single requests."""

    link: FaultyLink
    hung = False
    full = False
    offers: set[str]
    """Names of the requests whose KV is kept for others."""
    _missed: list[Inbound]

    def start(self) -> None:
        self.offers, self._missed = set(), []
        super().start()

    @property
    def idle(self) -> bool:
        """Nothing is left of any request."""
        return not (self._served or self._reserved or self.offers or self.engine.jobs)

    @property
    def serving(self) -> list[str]:
        """Names of the requests that are answered here."""
        return sorted(self._served)

    def attach(self, owner: LinkEvents) -> None:
        """Belong to another router from now on; the requests of the one before are dropped."""
        self.link.abandon()
        self.drop_all()
        self.link = self._options.make_link(
            self.name, owner, self.receive, self.change_role, self.change_draining
        )

    def reconnect(self) -> None:
        """Connect again in the same life; the requests of the old connection are dropped."""
        facts = self.link.facts
        if facts is None:
            self.start()
            return
        self.drop_all()
        self.link.connect(facts)
        self.report()

    def hang(self) -> None:
        """Do nothing from now on."""
        self.hung = True

    def wake_up(self) -> None:
        """Go on where the hang began, with what has come meanwhile."""
        self.hung = False
        missed, self._missed = self._missed, []
        if self.link.connected:
            for message in missed:
                self.receive(message)
        now = self._scheduled = self._timeline.now
        self._timeline.at(now, self._wake, now)

    def fail_one(self, rng: random.Random) -> str:
        """End a request with an error, as one whose reservation has expired; returns its name."""
        names = sorted({*self._served, *self._reserved})
        if not names:
            return "none"
        name = rng.choice(names)
        self._abort(name)
        self.offers.discard(name)
        self._say(wire.Output(id=name, tokens=[], finish_reason="error", error="bad luck"))
        self._flush()
        self._schedule()
        return name

    def drop_all(self) -> None:
        super().drop_all()
        self.offers.clear()
        self._missed.clear()

    def receive(self, message: Inbound) -> None:
        if self.hung:
            self._missed.append(message)
            return
        if isinstance(message, (wire.Release, wire.AbortRequest)):
            self.offers.discard(message.id)
        if self.full and isinstance(message, (wire.AddRequest, wire.Reserve)):
            self._say(wire.Rejected(id=message.id, reason="full", retry_after=0.5))
            self._timeline.at(self._timeline.now, self._flush)
            return
        assert not isinstance(message, wire.AddRequest) or (
            message.id not in self._served and message.id not in self._reserved
        ), f"{self.name} was sent {message.id} twice"
        super().receive(message)

    def report(self) -> None:
        if not self.hung:
            super().report()

    def _say(self, message: RequestAnswer) -> None:
        if isinstance(message, wire.Offer) and message.source:
            self.offers.add(message.id)
        super()._say(message)

    def _wake(self, due: float) -> None:
        if not self.hung:
            super()._wake(due)
