"""Encoders and decoders of the messages: which side turns what into bytes, and back.

One msgpack map with a field ``type`` is one message. Between a server and its engine each ZeroMQ
message is one of them (`encode`, `MessageDecoder`). On a link each binary WebSocket frame is an
array of them (`frames.Outbox`, `FrameDecoder`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import msgspec
from msgspec.structs import replace

from pla_serve.wire.engine import AddRequest, FromEngine, ToEngine
from pla_serve.wire.link import FromInstance, ToInstance

MOST_MESSAGES = 1 << 17
"""Messages in one frame. A frame takes no further message beyond 1 MiB, and none is this short."""

Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
"""One message as bytes."""


class WireError(ValueError):
    """The bytes are not a message, or a field of the message is out of range."""


@dataclass(frozen=True, slots=True)
class BadMessage:
    """A message within a frame that cannot be obeyed, and whose frame is otherwise sound."""

    id: str
    """Id of the request that it is about."""
    reason: str


class _Id(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(max_length=512)]


class _RequestId(msgspec.Struct):
    request: _Id


_read_id = msgspec.msgpack.Decoder(_Id).decode
_read_inner_id = msgspec.msgpack.Decoder(_RequestId).decode


class MessageDecoder(Generic[Message]):
    """Reads single messages of one union of structs."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode

    def __call__(self, content: bytes | msgspec.Raw) -> Message:
        """Return the message.

        Raises:
            WireError: the bytes are not a message, or a field is out of range.
        """
        try:
            message: Message = self._decode(content)
        except (ValueError, RecursionError) as error:  # bad UTF-8 is no DecodeError
            raise WireError(str(error) or type(error).__name__) from None
        return message


class FrameDecoder(Generic[Message]):
    """Reads frames, arrays of messages of one union of structs."""

    def __init__(self, kind: Any) -> None:
        self._read = MessageDecoder[Message](kind)
        self._split = MessageDecoder[list[msgspec.Raw]](
            Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MOST_MESSAGES)]
        )

    def __call__(self, frame: bytes) -> Iterator[Message | BadMessage]:
        """The messages of a frame, in order.

        A message that names a request and is wrong otherwise comes as `BadMessage`, so that one
        request's fault does not end the others.

        Raises:
            WireError: the frame is no array, or a message names no request.
        """
        for raw in self._split(frame):
            try:
                message = self._read(raw)
            except WireError as error:
                id = named_request(raw)
                if id is None:
                    raise
                yield BadMessage(id, str(error))
            else:
                yield message


_read_request = MessageDecoder[AddRequest](AddRequest)


def named_request(content: bytes | msgspec.Raw) -> str | None:
    """Id of the request that a broken message is about; None if it names none."""
    for read, inner in ((_read_id, False), (_read_inner_id, True)):
        try:
            found: Any = read(content)
        except (ValueError, RecursionError):
            continue
        return str(found.request.id if inner else found.id)
    return None


def range_fault(request: AddRequest) -> str | None:
    """Field of a request that is out of range, in words, or None.

    An engine asks this of every request, wherever it was made. The prompt is not looked at: the
    engine compares it with the model's vocabulary.
    """
    try:
        _read_request(encode(replace(request, prompt=[])))
    except (WireError, OverflowError) as error:
        return str(error)
    return None


def engine_inbox() -> MessageDecoder[ToEngine]:
    """Return the decoder of messages to an engine, for the process that hosts it."""
    return MessageDecoder(ToEngine)


def engine_answers() -> MessageDecoder[FromEngine]:
    """Return the decoder of messages from an engine, for its server."""
    return MessageDecoder(FromEngine)


def instance_frames() -> FrameDecoder[ToInstance]:
    """Return the decoder of frames from routers, for an instance."""
    return FrameDecoder(ToInstance)


def router_frames() -> FrameDecoder[FromInstance]:
    """Return the decoder of frames from instances, for a router."""
    return FrameDecoder(FromInstance)
