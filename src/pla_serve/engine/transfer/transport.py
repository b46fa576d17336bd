"""The transport: it copies bytes from the memory of another engine into this one's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pla_serve.engine.transfer.layout import Copy


class TransportError(Exception):
    """The other engine cannot be reached, or has ended."""


class TransferOperation(Protocol):
    """One running read."""

    def done(self) -> bool:
        """Whether all bytes have arrived; never waits.

        Once this has returned True or raised, the read writes nothing any more.

        Raises:
            TransportError: the read failed, and any part of the bytes may have arrived.
        """
        ...


class KVTransport(Protocol):
    """Connection of one engine to all others; all calls come from one thread."""

    @property
    def name(self) -> str:
        """Name of this engine, which differs in each life of the process."""
        ...

    @property
    def metadata(self) -> bytes:
        """Addresses and keys that others need to read this engine's memory."""
        ...

    def read(self, agent: str, metadata: bytes, copies: Sequence[Copy]) -> TransferOperation:
        """Begin to read from the engine of that name, and connect to it first if necessary.

        Raises:
            TransportError: the engine cannot be reached; no read was begun.
        """
        ...

    def progress(self) -> None:
        """Answer engines that connect to this one; call it again and again."""
        ...
