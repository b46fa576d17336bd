"""Ports of the loopback interface that nobody else is given while a test runs."""

from __future__ import annotations

import socket
from types import TracebackType


class ReservedPort:
    """A port that stays the same whenever a process is started again.

    A socket is bound to the port and never listens. Linux then lets a process that sets
    SO_REUSEADDR, as every server of Python does, listen on the port, and gives the port to no
    process that asks for a free one.

    Raises:
        OSError: no port is free.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, 0))
        self.number: int = self._socket.getsockname()[1]

    def close(self) -> None:
        """Free the port."""
        self._socket.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
