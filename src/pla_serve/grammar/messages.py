"""Messages between a process, its grammar workers, and the nursery that forks the workers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import msgspec

from pla_serve.grammar.limits import GrammarLimits
from pla_serve.wire.engine import Grammar


class OpenGrammar(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Compile a grammar, replay tokens of a text, and compute the mask after them."""

    id: int
    grammar: Grammar
    tokens: list[int]


class Advance(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Append a token to a text, and compute the mask after it."""

    id: int
    token: int


class Close(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Forget a text. There is no answer."""

    id: int


class Advanced(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Answer to `OpenGrammar` and to each `Advance`: the effect of the tokens."""

    id: int
    error: str | None
    finished: bool
    """Whether the text is complete, so that nothing can follow."""
    seconds: float = 0.0
    """CPU time that the token took; 0 for an `OpenGrammar`."""


class GrammarMask(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Mask after the last token, or an error. One mask may answer several `Advance` messages."""

    id: int
    error: str | None
    must_stop: bool
    """Whether the mask allows only EOS tokens."""
    bits: bytes
    """Bit ``i % 8`` of byte ``i // 8`` allows token i; a multiple of 4 bytes."""
    seconds: float = 0.0
    """CPU time that the mask took."""


class Fork(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """Fork a worker. The worker's end of a socket pair is attached."""

    id: int


class Kill(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """End a worker at once."""

    id: int


class Watch(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Look at the workers often for a while: they have work that may be long."""


class Forked(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """A worker has started."""

    id: int
    pid: int


class Exited(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A worker has ended."""

    id: int
    status: int
    """Exit status, or minus the signal that ended the worker."""
    working: int
    """Text that the worker computed for when it ended; 0 for none."""


class Slow(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A worker takes long for one piece of work. It goes on at low priority."""

    id: int
    working: int
    """Text that it computes for."""


class NurseryLaunch(msgspec.Struct, frozen=True):
    """The first message to a nursery."""

    vocab_size: int
    eos_token_ids: list[int]
    limits: GrammarLimits


ToWorker = OpenGrammar | Advance | Close
FromWorker = Advanced | GrammarMask
ToNursery = Fork | Kill | Watch
FromNursery = Forked | Exited | Slow

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
        """Whether the other side has closed the socket."""
        self._decode = msgspec.msgpack.Decoder(receives).decode
        self._in = bytearray()
        self._out = bytearray()

    def put(self, message: msgspec.Struct) -> None:
        """Keep a message for `flush`, so that several messages take one call to the system."""
        body = _encoder.encode(message)
        self._out += len(body).to_bytes(4, "little") + body

    def send(self, message: msgspec.Struct, descriptor: int | None = None) -> None:
        """Send a message. What a non-blocking socket does not take now is kept for `flush`.

        Args:
            descriptor: a file that goes with the message; the other side gets them in order.
        """
        self.put(message)
        if descriptor is not None:
            # Kept bytes go first: the descriptor travels with the first byte of what is sent here.
            sent = socket.send_fds(self.socket, [bytes(self._out)], [descriptor])
            del self._out[:sent]
        self.flush()

    def flush(self) -> bool:
        """Send what was kept. Returns whether nothing is left."""
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
        """Read once what has arrived, for `messages`. Returns False if nothing has.

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
        """Yield the messages that `read` has completed."""
        while len(self._in) >= 4:
            end = 4 + int.from_bytes(self._in[:4], "little")
            if len(self._in) < end:
                return
            message = self._decode(bytes(self._in[4:end]))
            del self._in[:end]
            yield message
