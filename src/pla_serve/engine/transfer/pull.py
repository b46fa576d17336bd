"""One offer being read, layer by layer as it is computed: a state machine without clock or thread.

It alternates between a look at the offer's slot and a read of what the look found computed. What
was read before a look that finds the offer standing is confirmed, and nothing else is ever used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pla_serve.engine.kv.blocks import BlockRun
from pla_serve.engine.transfer.layout import Copy, KVLayout, KVSource
from pla_serve.engine.transfer.ledger import SLOT_BYTES, LedgerReading, Slots
from pla_serve.engine.transfer.transport import KVTransport, Operation, TransportError

READ_BYTES = 4 * 2**20
"""Most bytes in one read: what a cancelled pull may still have to wait for."""


@dataclass(frozen=True, slots=True)
class PullRequest:
    """What to read, and where to."""

    key: int
    """Told with all that is reported of it."""
    source: KVSource
    runs: list[BlockRun]
    """Blocks here, in the order of the tokens."""
    skip: int
    """Leading tokens whose KV is here already."""


@dataclass(frozen=True, slots=True)
class PullReport:
    """How far one pull has come."""

    key: int
    confirmed: int
    """Leading tokens whose KV is here and confirmed, those that were here before included."""
    ended: bool
    """It reads no more, and nothing that it began will write to memory any more."""
    failure: str | None
    """Why it ended before it was complete."""
    bytes_read: int
    """Since the last report."""
    bytes_early: int
    """Of these, what was read before the other engine had computed its last layer."""


class Pull:
    """Reads one offer. ``step`` goes on as far as it can without waiting.

    Args:
        slots, row: where looks at the other engine's slot go.
    """

    def __init__(self, request: PullRequest, layout: KVLayout, slots: Slots, row: int) -> None:
        self.key = request.key
        self.row = row
        self._request = request
        self._source = request.source
        self._layout = layout
        self._slots = slots
        self._read = [request.skip] * layout.layers
        """By layer: leading tokens that have been read."""
        self._looked: list[int] = []
        """``_read`` when the look under way began."""
        self._seen: LedgerReading | None = None
        self._operation: Operation | None = None
        self._reading: list[tuple[int, int]] = []
        """Layers of the read under way, and the tokens that they will then have."""
        self._bytes = 0
        self._counted = [0, 0]
        self._cancelled = False
        self.confirmed = request.skip
        self.failure: str | None = None

    @property
    def ended(self) -> bool:
        """It will do nothing more, and nothing that it began goes on."""
        return self._operation is None and self._over

    @property
    def waits(self) -> bool:
        """A read or a look is under way."""
        return self._operation is not None

    def cancel(self) -> None:
        """Begin nothing more; a read that is under way still ends in its own time."""
        self._cancelled = True

    def step(self, transport: KVTransport) -> bool:
        """Whether anything has come of it; if not, ask again a little later."""
        try:
            if self._operation is None:
                if self._over:
                    return False
                self._operation = self._begin(transport)
            if not self._operation.done():
                return False
        except TransportError as error:
            self.failure = str(error)
            self._operation, self._reading = None, []
            return True
        self._operation = None
        return self._took_in() if self._reading else self._looked_up()

    def report(self) -> PullReport:
        """How far it is; counts bytes since it was called last."""
        counted, self._counted = self._counted, [0, 0]
        return PullReport(self.key, self.confirmed, self.ended, self.failure, *counted)

    @property
    def _over(self) -> bool:
        return self._cancelled or self.failure is not None or self.confirmed >= self._source.tokens

    def _begin(self, transport: KVTransport) -> Operation:
        copies = self._next_copies()
        if not copies:
            self._looked = self._read.copy()
            here = self._slots.address(self.row)
            copies = [Copy(here, self._source.slot, SLOT_BYTES)]
        self._bytes = sum(copy.size for copy in copies)
        return transport.read(self._source.agent, self._source.metadata, copies)

    def _took_in(self) -> bool:
        """KV has arrived; it counts for nothing until it is confirmed."""
        for layer, tokens in self._reading:
            self._read[layer] = tokens
        self._reading = []
        self._counted[0] += self._bytes
        if self._seen is not None and self._seen.whole < self._source.tokens:
            self._counted[1] += self._bytes
        return True

    def _looked_up(self) -> bool:
        """The other engine's slot has arrived."""
        seen = self._slots.read(self.row)
        if seen is None:
            return False  # caught in the middle of a change
        if seen.generation != self._source.generation:
            self.failure = "the offer was withdrawn"
            return True
        confirmed, known = min(self._looked), (self.confirmed, self._seen)
        self.confirmed, self._seen = confirmed, seen
        return known != (confirmed, seen)

    def _next_copies(self) -> Sequence[Copy]:
        """What is computed there and not here, as much of it as one read may have."""
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
