"""What crosses the sockets between a process, its grammar workers and their nursery."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import msgspec

from pla_serve.grammar.limits import GrammarLimits
from pla_serve.wire.engine import Grammar


class Open(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Compile a grammar, go past the tokens that were made already, and compute a mask."""

    id: int
    grammar: Grammar
    tokens: list[int]


class Advance(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Go past a token, and compute the mask after it."""

    id: int
    token: int


class Close(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Forget this text. Nothing is answered."""

    id: int


class Advanced(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """The answer to `Open` and to each `Advance`."""

    id: int
    error: str | None
    finished: bool
    """The text is complete and nothing can be added."""


class Mask(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The mask after the last token, unless there was an error. One may serve several tokens."""

    id: int
    error: str | None
    must_stop: bool
    """The mask allows nothing but an end."""
    bits: bytes
    """Bit ``i % 8`` of byte ``i // 8`` allows token i; a multiple of 4 bytes."""


class Working(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """What is computed from now on, until the next message, is for this text."""

    id: int


class Fork(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Make a worker. Its end of a socket pair comes with this message."""

    id: int


class Kill(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """End a worker at once."""

    id: int


class Forked(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """A worker runs."""

    id: int
    pid: int


class Exited(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A worker has ended."""

    id: int
    status: int
    """Its exit status, or minus the signal that ended it."""


class NurseryLaunch(msgspec.Struct, frozen=True):
    """The first message to a nursery."""

    vocab_size: int
    eos_token_ids: list[int]
    limits: GrammarLimits


ToWorker = Open | Advance | Close
FromWorker = Advanced | Mask | Working
ToNursery = Fork | Kill
FromNursery = Forked | Exited

_READ_BYTES = 256 * 1024
_MOST_DESCRIPTORS = 16
_encoder = msgspec.msgpack.Encoder()


class Frames:
    """Messages over a stream socket, each after its length in 4 bytes.

    Args:
        receives: the type of what comes in.
    """

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self.socket = sock
        self.ended = False
        """The other side has closed the socket, or is gone."""
        self._decode = msgspec.msgpack.Decoder(receives).decode
        self._in = bytearray()
        self._out = bytearray()

    def send(self, message: msgspec.Struct, descriptor: int | None = None) -> None:
        """Send, or keep what the socket does not take now for `flush`; never blocks if it does not.

        Args:
            descriptor: a file that goes with the message; the other side gets them in order.
        """
        body = _encoder.encode(message)
        self._out += len(body).to_bytes(4, "little") + body
        if descriptor is not None:
            # Kept bytes go first: the descriptor travels with the first byte of what is sent here.
            sent = socket.send_fds(self.socket, [bytes(self._out)], [descriptor])
            del self._out[:sent]
        self.flush()

    def flush(self) -> bool:
        """Send what was kept; True if nothing is left."""
        while self._out and not self.ended:
            try:
                sent = self.socket.send(self._out)
            except BlockingIOError:
                return False
            except OSError:
                self.ended = True
                break
            del self._out[:sent]
        return True

    def read(self, descriptors: list[int] | None = None) -> bool:
        """Read once what is there; False if that was nothing. See `messages` for what it holds.

        Args:
            descriptors: files that come with messages are appended; None refuses them.
        """
        try:
            if descriptors is None:
                data = self.socket.recv(_READ_BYTES)
            else:
                data, files, _, _ = socket.recv_fds(self.socket, _READ_BYTES, _MOST_DESCRIPTORS)
                descriptors += files
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.ended = True
            return False
        self._in += data
        return True

    def messages(self) -> Iterator[Any]:
        """Whole messages that were read."""
        while len(self._in) >= 4:
            end = 4 + int.from_bytes(self._in[:4], "little")
            if len(self._in) < end:
                return
            message = self._decode(bytes(self._in[4:end]))
            del self._in[:end]
            yield message
