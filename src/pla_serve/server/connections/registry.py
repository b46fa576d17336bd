"""All connections of clients: their number is bounded, and those without a request make room."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from typing import Protocol

from pla_serve.server.limits import Limits

SWEEP_SECONDS = 0.5
"""How often deadlines are looked at."""
MOST_HEAD_BYTES = 32 * 2**20
"""Most bytes of all incomplete heads together."""


class Connection(Protocol):
    """One connection, as the registry sees it. Times are seconds on the event loop's clock."""

    address: str
    """Address of the client, without its port."""

    def overdue(self, now: float) -> bool:
        """Whether the client has let a deadline pass."""

    def expire(self) -> None:
        """Close the connection because of `overdue`."""

    def drop(self) -> None:
        """Close the connection to make room."""


class ConnectionRegistry:
    """Counts connections and closes those that are overdue. Belongs to one event loop.

    A connection *waits* while it has no complete request: it is new, or its last request has been
    answered. Where there are too many, the one that has waited longest is closed, so sockets that
    say nothing cannot keep others out.
    """

    def __init__(self, limits: Limits, *, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.limits = limits
        self.refused = 0
        """Counter: connections closed for want of room."""
        self._loop = loop or asyncio.get_running_loop()
        self._all: set[Connection] = set()
        # Both in the order in which they began to wait. Those that never sent a request go first.
        self._new: dict[Connection, None] = {}
        self._idle: dict[Connection, None] = {}
        self._addresses: Counter[str] = Counter()
        self._head_bytes = 0
        self._sweep: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._all)

    def add(self, connection: Connection) -> bool:
        """Take a new connection in; False if there is no room for it."""
        address = connection.address
        most = self.limits.max_connections_per_address
        crowded = most and self._addresses[address] >= most and not is_loopback(address)
        if crowded or (len(self._all) >= self.limits.max_connections and not self.evict()):
            self.refused += 1
            return False
        self._all.add(connection)
        self._new[connection] = None
        self._addresses[address] += 1
        if self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_SECONDS, self._look)
        return True

    def remove(self, connection: Connection) -> None:
        """Forget a connection that was closed; unknown ones are ignored."""
        if connection not in self._all:
            return
        self._all.remove(connection)
        self.began(connection)
        self._addresses[connection.address] -= 1
        if not self._addresses[connection.address]:
            del self._addresses[connection.address]

    def began(self, connection: Connection) -> None:
        """Note that a connection has a complete request."""
        self._new.pop(connection, None)
        self._idle.pop(connection, None)

    def ended(self, connection: Connection) -> None:
        """Note that the request of a connection was answered: the connection waits again."""
        if connection in self._all:
            self._idle[connection] = None

    def hold(self, by: int) -> None:
        """Count bytes of incomplete heads; negative once a head is complete or gone."""
        self._head_bytes += by
        while self._head_bytes > MOST_HEAD_BYTES and self.evict():
            pass

    def evict(self) -> bool:
        """Close the connection that has waited longest; False if none waits."""
        waiting = self._new or self._idle
        if not waiting:
            return False
        connection = next(iter(waiting))
        self.refused += 1
        self.remove(connection)
        connection.drop()
        return True

    def _look(self) -> None:
        now = self._loop.time()
        for connection in [each for each in self._all if each.overdue(now)]:
            connection.expire()
        self._sweep = self._loop.call_later(SWEEP_SECONDS, self._look) if self._all else None


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a Unix socket, or none
        return True
