"""Messages queued for a link, and frames made of them.

A frame is a msgpack array; messages that are queued in one turn of the event loop leave together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from pla_serve.wire.codec import encode

FRAME_BYTES = 1 << 20
"""No message is added to a frame that has reached this size."""


class Overflow(Exception):
    """The peer does not read as fast as there is something to say."""


class Outbox:
    """Queue of encoded messages for one socket, with a bounded number of bytes.

    Args:
        most_bytes: `put` refuses what would exceed it. A single message may be longer.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._wake: asyncio.Future[None] | None = None

    def put(self, message: Any) -> None:
        """Queue a message. Never blocks.

        Raises:
            Overflow: too much waits; the message was not added.
        """
        encoded = encode(message)
        if self._waiting and self._bytes + len(encoded) > self._most_bytes:
            raise Overflow(f"more than {self._most_bytes} bytes wait to be read")
        self._waiting.append(encoded)
        self._bytes += len(encoded)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def take(self) -> bytes:
        """Wait for messages, and return the next frame. Only one task may call it."""
        while not self._waiting:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        parts = [b""]
        size = 0
        while self._waiting and size < FRAME_BYTES:
            parts.append(self._waiting.popleft())
            size += len(parts[-1])
        self._bytes -= size
        parts[0] = _array_header(len(parts) - 1)
        return b"".join(parts)


def _array_header(items: int) -> bytes:
    """First bytes of a msgpack array of so many items."""
    if items < 16:
        return bytes((0x90 | items,))
    if items < 1 << 16:
        return b"\xdc" + items.to_bytes(2, "big")
    return b"\xdd" + items.to_bytes(4, "big")
