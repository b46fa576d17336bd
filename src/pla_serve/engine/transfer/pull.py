"""A pull: one offer being read, layer by layer as the KV is computed.

A pull is a state machine without clock or thread. It alternates between reading the offer's slot in
the ledger of the other engine (a *look*) and reading the KV that the last look found computed. KV
is confirmed, and may be used, once a later look finds that the offer still stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pla_serve.engine.kv.blocks import BlockRun
from pla_serve.engine.transfer.layout import Copy, KVLayout, KVSource
from pla_serve.engine.transfer.ledger import SLOT_BYTES, LedgerReading, Slots
from pla_serve.engine.transfer.transport import KVTransport, TransferOperation, TransportError

READ_BYTES = 4 * 2**20
"""Most bytes in one read, and so the most that a cancelled pull still waits for."""


@dataclass(frozen=True, slots=True)
class PullRequest:
    """An offer to read, and the blocks to read it into."""

    key: int
    """Number of the pull, repeated in its reports."""
    source: KVSource
    runs: list[BlockRun]
    """Blocks of this engine, in the order of the tokens."""
    skip: int
    """Number of leading tokens whose KV is in these blocks already."""


@dataclass(frozen=True, slots=True)
class PullReport:
    """Progress of one pull since its last report."""

    key: int
    confirmed: int
    """Number of leading tokens whose KV is here and confirmed, with those that were skipped."""
    ended: bool
    """Whether the pull is over and nothing that it began can write to memory any more."""
    failure: str | None
    """Why the pull ended before it was complete."""
    bytes_read: int
    """Bytes of KV read since the last report."""
    bytes_early: int
    """Those of them that were read before the other engine had computed its last layer."""


class Pull:
    """Reads one offer; call `step` until `ended`.

    Args:
        slots: rows of memory that looks are read into.
        row: the row that belongs to this pull.
    """

    def __init__(self, request: PullRequest, layout: KVLayout, slots: Slots, row: int) -> None:
        self.key = request.key
        self.row = row
        self._request = request
        self._source = request.source
        self._layout = layout
        self._slots = slots
        self._read = [request.skip] * layout.layers
        """Number of leading tokens that have been read, for each layer."""
        self._looked: list[int] = []
        """Copy of ``_read`` from when the running look began."""
        self._seen: LedgerReading | None = None
        self._operation: TransferOperation | None = None
        self._reading: list[tuple[int, int]] = []
        """Layers of the running read, each with the leading tokens that it will have then."""
        self._bytes = 0
        self._counted = [0, 0]
        self._cancelled = False
        self.confirmed = request.skip
        self.failure: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the pull is over and no read of it is running."""
        return self._operation is None and self._over

    @property
    def waits(self) -> bool:
        """Whether a read or a look is running."""
        return self._operation is not None

    def cancel(self) -> None:
        """Begin no further read; one that is running still has to end."""
        self._cancelled = True

    def fail(self, reason: str) -> None:
        """Give the pull up; it has ended once the read that is running, if any, is over."""
        self.failure = self.failure or reason

    def step(self, transport: KVTransport) -> bool:
        """Go on as far as possible without waiting.

        Returns:
            Whether there was progress; if not, call again a little later.
        """
        try:
            if self._operation is None:
                if self._over:
                    return False
                self._operation = self._begin(transport)
            if not self._operation.done():
                return False
        except TransportError as error:
            self.fail(str(error))
            self._operation, self._reading = None, []
            return True
        self._operation = None
        return self._finish_read() if self._reading else self._finish_look()

    def report(self) -> PullReport:
        """Return the progress since the last report."""
        counted, self._counted = self._counted, [0, 0]
        return PullReport(self.key, self.confirmed, self.ended, self.failure, *counted)

    @property
    def _over(self) -> bool:
        return self._cancelled or self.failure is not None or self.confirmed >= self._source.tokens

    def _begin(self, transport: KVTransport) -> TransferOperation:
        copies = self._next_copies()
        if not copies:
            self._looked = self._read.copy()
            here = self._slots.address(self.row)
            copies = [Copy(here, self._source.slot, SLOT_BYTES)]
        self._bytes = sum(copy.size for copy in copies)
        return transport.read(self._source.agent, self._source.metadata, copies)

    def _finish_read(self) -> bool:
        """Note that KV has arrived; a later look has to confirm it."""
        for layer, tokens in self._reading:
            self._read[layer] = tokens
        self._reading = []
        self._counted[0] += self._bytes
        if self._seen is not None and self._seen.whole < self._source.tokens:
            self._counted[1] += self._bytes
        return True

    def _finish_look(self) -> bool:
        """Evaluate the slot of the offer, which has arrived."""
        seen = self._slots.read(self.row)
        if seen is None:
            return False  # read while it was being changed: look again
        if seen.generation != self._source.generation:
            self.failure = "the offer was withdrawn"
            return True
        confirmed, known = min(self._looked), (self.confirmed, self._seen)
        self.confirmed, self._seen = confirmed, seen
        return known != (confirmed, seen)

    def _next_copies(self) -> Sequence[Copy]:
        """Return copies of KV that is computed there and missing here, at most READ_BYTES."""
        if self._seen is None:
            return ()
        copies: list[Copy] = []
        room = READ_BYTES
        for layer, start in enumerate(self._read):
            most = max(1, room // (2 * self._layout.token_bytes))
            stop = min(self._seen.available(layer), self._source.tokens, start + most)
            if stop <= start:
                continue
            copies += self._layout.copies(self._request.runs, self._source, layer, start, stop)
            self._reading.append((layer, stop))
            room -= 2 * (stop - start) * self._layout.token_bytes
            if room <= 0:
                break
        return copies
