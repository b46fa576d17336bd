"""KV that other engines may read here: kept, described in the ledger, and given back in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from pla_serve.engine.kv.blocks import BlockRun, extend_runs
from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.transfer.layout import KVLayout, KVSource
from pla_serve.engine.transfer.ledger import LedgerReading, Slots


@dataclass(slots=True)
class _Offer:
    slot: int
    progress: LedgerReading
    pinned: list[list[int]] = field(default_factory=list)
    """Blocks held for it, each list in the order of the tokens."""
    until: float | None = None
    """When its lease ends; None while its sequence runs."""


class Offers:
    """Offers by request. A block is held here from its offer until after its slot has changed.

    Args:
        slots: the ledger.
        generation: what the first slot holds; from a source of randomness, so that no slot of
            another life is ever taken for one of this.
    """

    def __init__(
        self,
        kv: KVManager,
        layout: KVLayout,
        slots: Slots,
        *,
        agent: str,
        metadata: bytes,
        generation: int,
    ) -> None:
        self._kv = kv
        self._layout = layout
        self._slots = slots
        self._agent = agent
        self._metadata = metadata
        self._generation = generation
        self._offers: dict[str, _Offer] = {}

    def __len__(self) -> int:
        return len(self._offers)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._offers

    def open(self, request_id: str, blocks: Sequence[int], tokens: int, computed: int) -> bytes:
        """Offer the KV of ``tokens`` tokens in ``blocks``, which their sequence holds.

        Returns the source for readers, or nothing if the ledger is full.
        """
        self._kv.pin(blocks)
        return self._open(request_id, list(blocks), tokens, computed)

    def lend(self, request_id: str, tokens: Sequence[int], until: float) -> tuple[bytes, int]:
        """Offer what is cached of ``tokens``; the source, and how many tokens it covers."""
        blocks = self._kv.pin_cached(tokens)
        covered = len(blocks) * self._kv.block_tokens
        source = self._open(request_id, blocks, covered, covered) if blocks else b""
        if not source:
            return b"", 0
        self._offers[request_id].until = until
        return source, covered

    def computed(self, request_id: str, tokens: int) -> None:
        """All layers of the first ``tokens`` tokens are there."""
        offer = self._offers.get(request_id)
        if offer is not None:
            self._publish(offer, LedgerReading(offer.progress.generation, tokens, 0, 0))

    def layers_computed(self, request_id: str, tokens: int, layers: int) -> None:
        """The first ``layers`` layers of the first ``tokens`` tokens are there."""
        offer = self._offers.get(request_id)
        if offer is not None:
            whole = offer.progress.whole
            self._publish(offer, LedgerReading(offer.progress.generation, whole, tokens, layers))

    def keep(self, request_id: str, blocks: Sequence[int], until: float) -> None:
        """Its sequence ends with these blocks, and the offer stands until then."""
        offer = self._offers.get(request_id)
        if offer is not None:
            # The prefix cache has put others in place of some; who holds a block of a path in it
            # has to hold the whole path.
            self._kv.pin(blocks)
            offer.pinned.insert(0, list(blocks))
            offer.until = until

    def running(self, request_id: str) -> bool:
        """There is an offer, and its sequence has not ended."""
        offer = self._offers.get(request_id)
        return offer is not None and offer.until is None

    def drop(self, request_id: str) -> None:
        """Withdraw an offer, if there is one; comes before its sequence gives up its blocks."""
        offer = self._offers.pop(request_id, None)
        if offer is None:
            return
        # In this order: whoever still finds the slot as it was has read blocks that were held.
        self._publish(offer, LedgerReading(0, 0, 0, 0))
        self._slots.give_back(offer.slot)
        while offer.pinned:
            self._kv.unpin(offer.pinned.pop())

    def expired(self, now: float) -> list[str]:
        """Whose lease is over."""
        return [i for i, o in self._offers.items() if o.until is not None and o.until <= now]

    def next_expiry(self) -> float | None:
        """When the next lease ends."""
        return min((o.until for o in self._offers.values() if o.until is not None), default=None)

    def _open(self, request_id: str, blocks: list[int], tokens: int, computed: int) -> bytes:
        slot = self._slots.take()
        if slot is None:
            self._kv.unpin(blocks)
            return b""
        self._generation += 1
        offer = _Offer(slot, LedgerReading(self._generation, computed, 0, 0), [blocks])
        self._offers[request_id] = offer
        self._publish(offer, offer.progress)
        runs: list[BlockRun] = []
        extend_runs(runs, blocks)
        return msgspec.msgpack.encode(
            KVSource(
                kind=self._layout.kind,
                agent=self._agent,
                metadata=self._metadata,
                slot=self._slots.address(slot),
                generation=self._generation,
                tokens=tokens,
                runs=runs,
                keys=self._layout.keys,
                values=self._layout.values,
            )
        )

    def _publish(self, offer: _Offer, progress: LedgerReading) -> None:
        offer.progress = progress
        self._slots.write(offer.slot, progress)
