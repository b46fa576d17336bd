"""KV transfer of one engine: what it offers, and what it takes over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from uuid import UUID

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.admission import Intake
from pla_serve.engine.requests.memory import MemoryGate
from pla_serve.engine.requests.sequence import Sequence
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

OFFERS = 4096
"""Most that can stand at once."""
PULLS = 256
"""Most that can be read at once; more wait for their turn."""
POLL_SECONDS = 0.001
"""Between two looks at what the reader reports, while the engine has nothing to compute."""


class PeerExchange:
    """See `Exchange`. Made by `connect`, or from parts."""

    def __init__(
        self,
        offers: Offers,
        reservations: Reservations,
        reader: Reader,
        thread: ReaderThread | None = None,
    ) -> None:
        self._offers = offers
        self._reservations = reservations
        self._reader = reader
        self._thread = thread
        self._offers_expired = 0

    def refuses(self, request: AddRequest) -> Rejected | None:
        """See `Exchange`."""
        return None

    def reserve(self, message: Reserve, now: float) -> tuple[Accepted | Rejected, Sequence | None]:
        """See `Exchange`."""
        answer = self._reservations.reserve(message, now)
        if self._thread is not None:
            self._thread.wake()
        return answer

    def begin(self, message: Begin, now: float) -> Rejected | None:
        """See `Exchange`."""
        return self._reservations.begin(message, now)

    def abandon(self, sequence: Sequence) -> None:
        """See `Exchange`."""
        self._reservations.abandon(sequence)

    @property
    def pending(self) -> bool:
        """See `Exchange`."""
        return bool(len(self._offers) or len(self._reservations)) or self._reservations.reading

    def poll(self, now: float) -> list[Arrival]:
        """See `Exchange`."""
        if len(self._offers):
            for request_id in self._offers.expired(now):
                self._offers.drop(request_id)
                self._offers_expired += 1
        return self._reservations.poll(now)

    def pause(self, now: float) -> float | None:
        """See `Exchange`."""
        if self._reservations.reading:
            return POLL_SECONDS
        ends = (self._offers.next_expiry(), self._reservations.next_expiry())
        return min((max(0.0, end - now) for end in ends if end is not None), default=None)

    def lend(self, message: Lend, now: float) -> Offer:
        """See `Exchange`."""
        self._offers.drop(message.id)
        until = now + message.lease_seconds
        source, tokens = self._offers.lend(message.id, message.tokens, until)
        return Offer(id=message.id, source=source, tokens=tokens)

    def release(self, request_id: str) -> None:
        """See `Exchange`."""
        self._offers.drop(request_id)

    def offer(self, sequence: Sequence) -> Offer:
        """See `Exchange`."""
        self._offers.drop(sequence.id)
        tokens = len(sequence.tokens)
        blocks = sequence.table.blocks
        source = self._offers.open(sequence.id, blocks, tokens, sequence.computed)
        return Offer(id=sequence.id, source=source, tokens=tokens)

    def layers_computed(self, sequences: Iterable[tuple[Sequence, int]], layers: int) -> None:
        """See `Exchange`."""
        for sequence, tokens in sequences:
            self._offers.layers_computed(sequence.id, tokens, layers)

    def computed(self, sequence: Sequence) -> None:
        """See `Exchange`."""
        self._offers.computed(sequence.id, sequence.computed)

    def hand_over(self, sequence: Sequence, now: float) -> None:
        """See `Exchange`."""
        hand_over = sequence.request.hand_over
        assert hand_over is not None
        until = now + hand_over.lease_seconds
        self._offers.keep(sequence.id, sequence.table.blocks, until)

    def withdraw(self, sequence: Sequence) -> None:
        """See `Exchange`."""
        if self._offers.running(sequence.id):
            self._offers.drop(sequence.id)

    def stats(self) -> TransferStats:
        """See `Exchange`."""
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
    life: UUID,
    transport: Callable[[str, list[tuple[int, int]]], KVTransport],
    threaded: bool = True,
) -> tuple[PeerExchange, Reader]:
    """An exchange, and its reader, over a transport that is made of a name and memory regions.

    Args:
        life: random; names this engine, and keeps its ledger apart from that of any other life.
        threaded: a thread drives the reader; else whoever calls this does.

    Raises:
        ValueError: the transport does not work here.
    """
    ledger, rows = Slots(OFFERS), Slots(PULLS)
    link = transport(f"pla-{life}", [*layout.regions(), ledger.region(), rows.region()])
    offers = Offers(
        kv,
        layout,
        ledger,
        agent=link.name,
        metadata=link.metadata,
        generation=life.int >> 66,  # leaves room in an int64 to count on from it
    )
    reader = Reader(link, layout, rows)
    thread = ReaderThread(reader) if threaded else None
    return PeerExchange(
        offers, Reservations(reader, layout, intake, gate, kv), reader, thread
    ), reader
