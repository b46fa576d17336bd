"""What moves bytes from another engine's memory into this one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pla_serve.engine.transfer.layout import Copy


class TransportError(Exception):
    """The other engine cannot be reached, or is gone."""


class Operation(Protocol):
    """One read under way."""

    def done(self) -> bool:
        """Whether all its bytes have arrived; asks the transport, never waits.

        Once it has answered True or raised, nothing is written here any more.

        Raises:
            TransportError: it failed, and any part of the bytes may have arrived.
        """
        ...


class KVTransport(Protocol):
    """All calls come from one thread."""

    @property
    def name(self) -> str:
        """Of this engine; another one in each life of the process."""
        ...

    @property
    def metadata(self) -> bytes:
        """What others need to reach this engine's memory."""
        ...

    def read(self, agent: str, metadata: bytes, copies: Sequence[Copy]) -> Operation:
        """Begin to read from the engine of that name; connects to it if need be.

        Raises:
            TransportError: nothing was begun.
        """
        ...

    def progress(self) -> None:
        """Serve what others ask of this engine; to be called again and again."""
        ...
