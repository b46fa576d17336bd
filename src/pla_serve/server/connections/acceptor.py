"""Accepts connections a few at a time, and stops before file descriptors run out."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

AT_ONCE = 16
"""Connections accepted before the event loop does something else."""
PAUSE_SECONDS = 0.1
"""How long nobody is let in after descriptors ran short."""


class Acceptor:
    """Accepts on ``listener`` until `close`. Takes the place of an `asyncio.Server` in uvicorn.

    The system gives a new descriptor the lowest free number, so the number of a fresh connection
    says how many are open.

    Args:
        make: makes the protocol of one connection.
        most: highest descriptor that a connection may have.
        make_room: closes a connection that has no request; False if there is none.
    """

    def __init__(
        self,
        listener: socket.socket,
        make: Callable[[], asyncio.Protocol],
        *,
        most: int,
        make_room: Callable[[], bool],
    ) -> None:
        self.sockets = (listener,)
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._make = make
        self._most = most
        self._make_room = make_room
        self._tasks: set[asyncio.Task[None]] = set()
        self._resuming: asyncio.TimerHandle | None = None
        listener.setblocking(False)
        self._resume()

    def close(self) -> None:
        """Accept nobody any more, and close the listening socket of this process."""
        if self._resuming is not None:
            self._resuming.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()

    async def wait_closed(self) -> None:
        """Return once no connection is being set up."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _resume(self) -> None:
        self._resuming = None
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def _pause(self) -> None:
        self._loop.remove_reader(self._listener.fileno())
        self._resuming = self._loop.call_later(PAUSE_SECONDS, self._resume)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptors or no memory, in this process or in the system
                self._make_room()
                self._pause()
                return
            if connection.fileno() > self._most:
                connection.close()
                for _ in range(AT_ONCE):
                    self._make_room()
                self._pause()
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._connect(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, connection)
        except OSError:
            with suppress(OSError):
                connection.close()
