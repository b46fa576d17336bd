"""What the engine's loop asks of KV transfer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from pla_serve.engine.requests.sequence import Sequence
from pla_serve.wire.engine import (
    Accepted,
    AddRequest,
    Begin,
    Lend,
    Offer,
    Output,
    Rejected,
    Release,
    Reserve,
    TransferStats,
)

TransferMessage = Reserve | Begin | Lend | Release


class Arrival(NamedTuple):
    """What has become of a reserved sequence."""

    sequence: Sequence
    end: Output | None
    """Set: it ends with this. None: it goes on; ``computed`` says what KV it has."""


class KVExchange(Protocol):
    """KV transfer of one engine. Nothing here waits for another engine."""

    def refuses(self, request: AddRequest) -> Rejected | None:
        """The answer to a request that cannot be handed over from here."""
        ...

    # This engine takes over

    def reserve(self, message: Reserve, now: float) -> tuple[Accepted | Rejected, Sequence | None]:
        """The answer, and if it is accepted a sequence that has its memory.

        It is ``in_flight`` until `poll` yields it or `abandon` is told of it.
        """
        ...

    def begin(self, message: Begin, now: float) -> Rejected | None:
        """Its sequence comes out of `poll` as soon as nothing more is to be read."""
        ...

    def abandon(self, sequence: Sequence) -> None:
        """It was aborted: if it was reserved it is ``in_flight`` no longer."""
        ...

    @property
    def pending(self) -> bool:
        """Whether `poll` may have something to do."""
        ...

    def poll(self, now: float) -> list[Arrival]:
        """Reserved sequences that go on from here, or end. Ends leases that are over."""
        ...

    def pause(self, now: float) -> float | None:
        """Seconds until `poll` should be asked again; None: not before another message."""
        ...

    # Others take over from this engine

    def lend(self, message: Lend, now: float) -> Offer:
        """Offer what is cached."""
        ...

    def release(self, request_id: str) -> None:
        """An offer is needed no longer."""
        ...

    def offer(self, sequence: Sequence) -> Offer:
        """A sequence to be handed over has its memory, and its prefill begins."""
        ...

    def layers_computed(self, sequences: Iterable[tuple[Sequence, int]], layers: int) -> None:
        """In a running pass: so many layers are there, up to so many tokens of each sequence."""
        ...

    def computed(self, sequence: Sequence) -> None:
        """All layers are there of ``sequence.computed`` tokens."""
        ...

    def hand_over(self, sequence: Sequence, now: float) -> None:
        """Its prefill is done: keep its KV for the time of its lease."""
        ...

    def withdraw(self, sequence: Sequence) -> None:
        """A sequence is about to give up its blocks; one that was handed over keeps its offer."""
        ...

    def stats(self) -> TransferStats | None:
        """For the report."""
        ...


def receive(
    exchange: KVExchange, message: TransferMessage, now: float
) -> tuple[Accepted | Offer | Rejected | None, Sequence | None]:
    """Hand a message on; the answer, and the sequence that was reserved."""
    if isinstance(message, Reserve):
        return exchange.reserve(message, now)
    if isinstance(message, Begin):
        return exchange.begin(message, now), None
    if isinstance(message, Lend):
        return exchange.lend(message, now), None
    exchange.release(message.id)
    return None, None


class NoKVExchange:
    """An engine without KV transfer: refuses what needs it."""

    def refuses(self, request: AddRequest) -> Rejected | None:
        return None if request.hand_over is None else _refusal(request.id)

    def reserve(self, message: Reserve, now: float) -> tuple[Accepted | Rejected, Sequence | None]:
        return _refusal(message.request.id), None

    def begin(self, message: Begin, now: float) -> Rejected | None:
        return _refusal(message.id)

    def abandon(self, sequence: Sequence) -> None: ...

    @property
    def pending(self) -> bool:
        return False

    def poll(self, now: float) -> list[Arrival]:
        return []

    def pause(self, now: float) -> float | None:
        return None

    def lend(self, message: Lend, now: float) -> Offer:
        return Offer(id=message.id, source=b"", tokens=0)

    def release(self, request_id: str) -> None: ...

    def offer(self, sequence: Sequence) -> Offer:
        raise AssertionError("refuses() lets nothing come here")

    def layers_computed(self, sequences: Iterable[tuple[Sequence, int]], layers: int) -> None: ...

    def computed(self, sequence: Sequence) -> None: ...

    def hand_over(self, sequence: Sequence, now: float) -> None: ...

    def withdraw(self, sequence: Sequence) -> None: ...

    def stats(self) -> TransferStats | None:
        return None


def _refusal(request_id: str) -> Rejected:
    return Rejected(
        id=request_id,
        reason="this instance exchanges no KV; start it with --kv-transfer",
        retry_after=None,
    )
