"""A request on its way from a replica of the API to a replica with an engine."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import msgspec
from msgspec.structs import replace

from pla_serve.fleet.router.prefixes import Chain
from pla_serve.wire.codec import MessageDecoder, encode
from pla_serve.wire.engine import AddRequest, RequestAnswer
from pla_serve.wire.limits import Duration

MOST_SECONDS = 1e8
"""Beyond this, the time from now to a deadline says nothing."""


class SentCall(msgspec.Struct, frozen=True):
    """The bytes of a call. Times of ``message`` are differences to the moment of sending."""

    message: AddRequest
    seconds: Duration
    """Predicted prefill."""
    short: bool


_read_call = MessageDecoder[SentCall](SentCall)
_read_answers = MessageDecoder[list[RequestAnswer]](list[RequestAnswer])


def read_call(packed: bytes, now: float) -> SentCall:
    """Return a call that a replica has received, with times on its own clock, which says ``now``.

    Raises:
        WireError: the bytes are no call.
    """
    call = _read_call(packed)
    message = call.message
    due = message.deadline
    arrival = now + min(max(message.arrival, -MOST_SECONDS), 0.0)
    deadline = None if due is None else now + min(due, MOST_SECONDS)
    return replace(call, message=replace(message, arrival=arrival, deadline=deadline))


def read_answers(packed: bytes) -> list[RequestAnswer]:
    """Return the answers that a replica sent at once; none are a sign of life.

    Raises:
        WireError: the bytes are no answers.
    """
    return _read_answers(packed)


class ReplicaCall:
    """A request to be placed. The request router finds it among the arguments, and writes to it.

    Where Ray sends it to a replica it is pickled, and the replica gets bytes for `read_call`. So
    what the router wrote stays in the process of the API.
    """

    def __init__(
        self,
        message: AddRequest,
        chain: Chain,
        clock: Callable[[], float],
        leave_out: Collection[str] = (),
    ) -> None:
        """
        Args:
            chain: of ``message.prompt``.
            clock: the one of ``message.arrival``.
            leave_out: replicas that refused or failed the request, and get it only if no other can.
        """
        self.message = message
        self.chain = chain
        self.leave_out = leave_out
        self.replica = ""
        """Where it was sent; empty until then."""
        self.replicas = 0
        """Replicas that there were."""
        self.seconds = 0.0
        self.short = True
        self.on_first: Callable[[int | None], None] = ignore
        """Called with the cached tokens of the prompt when the first token has come."""
        self._clock = clock

    def packed(self) -> bytes:
        """Return the bytes for `read_call`."""
        message, now = self.message, self._clock()
        deadline = None if message.deadline is None else message.deadline - now
        timed = replace(message, arrival=message.arrival - now, deadline=deadline)
        return encode(SentCall(timed, self.seconds, self.short))

    def __reduce__(self) -> tuple[Any, ...]:
        return bytes, (self.packed(),)


def ignore(cached_tokens: int | None) -> None:
    """Do nothing."""
