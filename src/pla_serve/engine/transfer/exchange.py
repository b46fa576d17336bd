"""KV transfer of one engine: the offers that it makes and the requests that it takes over."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.admission import Intake
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.transfer.credentials import Credentials, valid_lease
from pla_serve.engine.transfer.layout import KVLayout
from pla_serve.engine.transfer.ledger import Slots
from pla_serve.engine.transfer.offers import Offers
from pla_serve.engine.transfer.protocol import Arrival
from pla_serve.engine.transfer.reader import Reader, ReaderThread
from pla_serve.engine.transfer.reservations import Reservations
from pla_serve.engine.transfer.transport import KVTransport
from pla_serve.wire.engine import (
    Accepted,
    AddRequest,
    Begin,
    Lend,
    Offer,
    Rejected,
    Reserve,
    TransferStats,
)
from pla_serve.wire.limits import MOST_LEASE_SECONDS

OFFERS = 4096
"""Most offers at one time."""
PULLS = 256
"""Most offers that are read at one time; others wait for their turn."""
POLL_SECONDS = 0.001
"""Pause between two polls of the reader while the engine has nothing to compute."""
_BAD_LEASE = f"lease_seconds must lie above 0 and be at most {MOST_LEASE_SECONDS:g}"


class PeerExchange:
    """A `KVExchange` with other engines; `assemble` makes one.

    Args:
        most_tokens: tokens of the longest prompt that is looked up in the prefix cache.
    """

    def __init__(
        self,
        offers: Offers,
        reservations: Reservations,
        reader: Reader,
        thread: ReaderThread | None = None,
        *,
        most_tokens: int,
    ) -> None:
        self._most_tokens = most_tokens
        self._offers = offers
        self._reservations = reservations
        self._reader = reader
        self._thread = thread
        self._offers_expired = 0

    def refuses(self, request: AddRequest) -> Rejected | None:
        """See `KVExchange`."""
        hand_over = request.hand_over
        if hand_over is None or valid_lease(hand_over.lease_seconds):
            return None
        return Rejected(id=request.id, reason=_BAD_LEASE, retry_after=None)

    def reserve(self, message: Reserve, now: float) -> tuple[Accepted | Rejected, Sequence | None]:
        """See `KVExchange`."""
        if not valid_lease(message.lease_seconds):
            return Rejected(id=message.id, reason=_BAD_LEASE, retry_after=None), None
        answer = self._reservations.reserve(message, now)
        if self._thread is not None:
            self._thread.wake()
        return answer

    def begin(self, message: Begin, now: float) -> Rejected | None:
        """See `KVExchange`."""
        return self._reservations.begin(message, now)

    def abandon(self, sequence: Sequence) -> None:
        """See `KVExchange`."""
        self._reservations.abandon(sequence)

    @property
    def pending(self) -> bool:
        """See `KVExchange`."""
        return bool(len(self._offers) or len(self._reservations)) or self._reservations.reading

    def poll(self, now: float) -> list[Arrival]:
        """See `KVExchange`."""
        if len(self._offers):
            for request_id in self._offers.expired(now):
                self._offers.drop(request_id)
                self._offers_expired += 1
        return self._reservations.poll(now)

    def pause(self, now: float) -> float | None:
        """See `KVExchange`."""
        if self._reservations.reading:
            return POLL_SECONDS
        ends = (self._offers.next_expiry(), self._reservations.next_expiry())
        return min((max(0.0, end - now) for end in ends if end is not None), default=None)

    def lend(self, message: Lend, now: float) -> Offer:
        """See `KVExchange`."""
        self._offers.drop(message.id)
        offer, tokens = b"", 0
        if valid_lease(message.lease_seconds) and len(message.tokens) <= self._most_tokens:
            offer, tokens = self._offers.lend(
                message.id,
                message.tokens,
                now,
                message.lease_seconds,
                cache_scope=message.cache_scope,
            )
        return Offer(id=message.id, source=offer, tokens=tokens)

    def release(self, request_id: str) -> None:
        """See `KVExchange`."""
        self._offers.drop(request_id)

    def offer(self, sequence: Sequence) -> Offer:
        """See `KVExchange`."""
        self._offers.drop(sequence.id)
        signed = self._offers.open(
            sequence.id,
            sequence.table.blocks,
            sequence.tokens,
            sequence.computed,
            cache_scope=sequence.request.cache_scope,
        )
        return Offer(id=sequence.id, source=signed, tokens=len(sequence.tokens))

    def layers_computed(self, sequences: Iterable[tuple[Sequence, int]], layers: int) -> None:
        """See `KVExchange`."""
        for sequence, tokens in sequences:
            self._offers.layers_computed(sequence.id, tokens, layers)

    def computed(self, sequence: Sequence) -> None:
        """See `KVExchange`."""
        self._offers.computed(sequence.id, sequence.computed)

    def hand_over(self, sequence: Sequence, now: float) -> None:
        """See `KVExchange`."""
        hand_over = sequence.request.hand_over
        assert hand_over is not None
        until = now + hand_over.lease_seconds
        self._offers.keep(sequence.id, sequence.table.blocks, until)

    def withdraw(self, sequence: Sequence) -> None:
        """See `KVExchange`."""
        if self._offers.running(sequence.id):
            self._offers.drop(sequence.id)

    def stats(self) -> TransferStats:
        """See `KVExchange`."""
        incoming = self._reservations
        return TransferStats(
            offers=len(self._offers),
            reserved=len(incoming),
            taken_over=incoming.taken_over,
            recomputed=incoming.recomputed,
            expired=incoming.expired + self._offers_expired,
            bytes_read=incoming.bytes_read,
            bytes_early=incoming.bytes_early,
            read_seconds=self._reader.seconds,
        )


def assemble(
    layout: KVLayout,
    kv: KVManager,
    gate: MemoryGate,
    intake: Intake,
    *,
    credentials: Credentials,
    transport: Callable[[str, list[tuple[int, int]]], KVTransport],
    threaded: bool = True,
) -> tuple[PeerExchange, Reader]:
    """Make an exchange and its reader.

    Args:
        credentials: the name of this engine and the secret of its fleet.
        transport: makes a transport of this engine's name and of memory regions, each an address
            and a size in bytes.
        threaded: whether a thread drives the reader; otherwise the caller does.

    Raises:
        ValueError: the transport does not work here.
    """
    ledger, rows = Slots(OFFERS), Slots(PULLS)
    link = transport(credentials.reader, [*layout.regions(), ledger.region(), rows.region()])
    offers = Offers(
        kv,
        layout,
        ledger,
        credentials,
        agent=link.name,
        metadata=link.metadata,
        generation=credentials.life.int
        >> 66,  # below 2^62: counting on from it stays within an int64
    )
    reader = Reader(link, layout, rows)
    reservations = Reservations(reader, layout, credentials, intake, gate, kv)
    exchange = PeerExchange(
        offers,
        reservations,
        reader,
        ReaderThread(reader) if threaded else None,
        most_tokens=intake.limits.max_model_len,
    )
    return exchange, reader
