"""KV transfer as the engine's loop sees it."""

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
    """A reserved sequence that goes on in this engine, or ends."""

    sequence: Sequence
    end: Output | None
    """Last output of a sequence that ends. None: it goes on with the KV of ``computed`` tokens."""


class KVExchange(Protocol):
    """KV transfer of one engine; no method waits for another engine.

    On the source of a hand-over the loop calls `offer`, `layers_computed` and `computed` as the
    prefill runs, and `hand_over` at its end. On the target it calls `reserve` and `begin` for the
    messages of the router, and `poll` yields the sequence once its KV is there.
    """

    def refuses(self, request: AddRequest) -> Rejected | None:
        """Return a refusal if this request asks for a hand-over that is not possible here."""
        ...

    # This engine is the target

    def reserve(self, message: Reserve, now: float) -> tuple[Accepted | Rejected, Sequence | None]:
        """Return the answer and, if the request is accepted, a sequence that has its memory.

        The sequence is ``in_flight`` until `poll` yields it or `abandon` is called with it.
        """
        ...

    def begin(self, message: Begin, now: float) -> Rejected | None:
        """Let a reserved sequence go on: `poll` yields it when nothing more is to be read."""
        ...

    def abandon(self, sequence: Sequence) -> None:
        """End the reservation of a sequence that was aborted; others are ignored."""
        ...

    @property
    def pending(self) -> bool:
        """Whether `poll` may have something to do."""
        ...

    def poll(self, now: float) -> list[Arrival]:
        """Return reserved sequences that go on or end now, and end the leases that are over."""
        ...

    def pause(self, now: float) -> float | None:
        """Return seconds until the next `poll`; None: not before another message arrives."""
        ...

    # This engine is the source

    def lend(self, message: Lend, now: float) -> Offer:
        """Offer what the prefix cache has of the tokens in the message."""
        ...

    def release(self, request_id: str) -> None:
        """Withdraw an offer that nobody needs any more."""
        ...

    def offer(self, sequence: Sequence) -> Offer:
        """Offer the KV of a sequence whose prefill begins now."""
        ...

    def layers_computed(self, sequences: Iterable[tuple[Sequence, int]], layers: int) -> None:
        """Publish that a running batch has computed its first ``layers`` layers.

        Args:
            sequences: each with the number of its leading tokens that then have KV.
        """
        ...

    def computed(self, sequence: Sequence) -> None:
        """Publish that ``sequence.computed`` tokens have KV in all layers."""
        ...

    def hand_over(self, sequence: Sequence, now: float) -> None:
        """Keep the KV of a sequence whose prefill is done, until its lease ends."""
        ...

    def withdraw(self, sequence: Sequence) -> None:
        """Withdraw the offer of a sequence that gives up its blocks before its hand-over."""
        ...

    def stats(self) -> TransferStats | None:
        """Return counters for `EngineStats`; None without KV transfer."""
        ...


def receive(
    exchange: KVExchange, message: TransferMessage, now: float
) -> tuple[Accepted | Offer | Rejected | None, Sequence | None]:
    """Call the method for ``message``; return its answer and the sequence that was reserved."""
    if isinstance(message, Reserve):
        return exchange.reserve(message, now)
    if isinstance(message, Begin):
        return exchange.begin(message, now), None
    if isinstance(message, Lend):
        return exchange.lend(message, now), None
    exchange.release(message.id)
    return None, None


class NoKVExchange:
    """KV transfer of an engine without any: all that needs it is refused."""

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
