"""KV blocks that other engines may read: held, described in the ledger, and freed in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pla_serve.engine.kv.blocks import BlockRun, extend_runs
from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.transfer.credentials import Credentials
from pla_serve.engine.transfer.layout import KVLayout, KVSource, hash_tokens
from pla_serve.engine.transfer.ledger import LedgerReading, Slots
from pla_serve.wire.limits import MOST_OFFER_BYTES

PREFILL_SECONDS = 600.0
"""A reader may begin this long after a prefill began. Routers send an offer on at once, so this
only bounds how long a copied offer is worth anything."""


@dataclass(slots=True)
class _Offer:
    slot: int
    progress: LedgerReading
    pinned: list[list[int]] = field(default_factory=list)
    """Blocks held for the offer, each list in the order of the tokens."""
    until: float | None = None
    """End of the lease; None while the sequence runs."""


class Offers:
    """All offers of one engine, by request id.

    A block is held from the moment it is offered until after the offer's slot in the ledger has
    changed, so that a reader that finds the slot unchanged has read the right KV.

    Args:
        slots: the ledger.
        agent: name of this engine in the transport.
        metadata: what the transport of a reader needs to connect.
        generation: value of the first slot. A random number, so that no slot is ever taken for
            one of another life of this process.
    """

    def __init__(
        self,
        kv: KVManager,
        layout: KVLayout,
        slots: Slots,
        credentials: Credentials,
        *,
        agent: str,
        metadata: bytes,
        generation: int,
    ) -> None:
        self._kv = kv
        self._layout = layout
        self._slots = slots
        self._credentials = credentials
        self._agent = agent
        self._metadata = metadata
        self._generation = generation
        self._offers: dict[str, _Offer] = {}

    def __len__(self) -> int:
        return len(self._offers)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._offers

    def open(
        self,
        request_id: str,
        blocks: Sequence[int],
        tokens: Sequence[int],
        computed: int,
        *,
        cache_scope: str = "",
    ) -> bytes:
        """Offer the KV of a running prefill, whose sequence holds ``blocks``.

        Args:
            tokens: all tokens that the KV is, or will be, computed for.
            computed: number of leading tokens whose KV is there already.

        Returns:
            The signed offer; empty if the ledger is full.
        """
        self._kv.pin(blocks)
        expires = self._credentials.expiry(PREFILL_SECONDS)
        return self._open(request_id, list(blocks), tokens, computed, cache_scope, expires)

    def lend(
        self,
        request_id: str,
        tokens: Sequence[int],
        now: float,
        lease_seconds: float,
        *,
        cache_scope: str = "",
    ) -> tuple[bytes, int]:
        """Offer what the prefix cache has of ``tokens``, until the lease ends.

        Returns:
            The signed offer, and the number of tokens that it covers: (b"", 0) if none is cached.
        """
        blocks = self._kv.pin_cached(tokens, cache_scope)
        if not blocks:
            return b"", 0
        covered = len(blocks) * self._kv.block_tokens
        expires = self._credentials.expiry(lease_seconds)
        offer = self._open(request_id, blocks, tokens[:covered], covered, cache_scope, expires)
        if not offer:
            return b"", 0
        self._offers[request_id].until = now + lease_seconds
        return offer, covered

    def computed(self, request_id: str, tokens: int) -> None:
        """Publish that all layers of the first ``tokens`` tokens are computed."""
        offer = self._offers.get(request_id)
        if offer is not None:
            self._publish(offer, LedgerReading(offer.progress.generation, tokens, 0, 0))

    def layers_computed(self, request_id: str, tokens: int, layers: int) -> None:
        """Publish that the first ``layers`` layers of the first ``tokens`` tokens are computed."""
        offer = self._offers.get(request_id)
        if offer is not None:
            whole = offer.progress.whole
            self._publish(offer, LedgerReading(offer.progress.generation, whole, tokens, layers))

    def keep(self, request_id: str, blocks: Sequence[int], until: float) -> None:
        """Hold the final blocks of a sequence that ends now, until the lease ends."""
        offer = self._offers.get(request_id)
        if offer is not None:
            # The prefix cache has replaced some of the blocks offered by equal ones of its own.
            # Whoever holds a block in the cache has to hold all blocks before it as well.
            self._kv.pin(blocks)
            offer.pinned.insert(0, list(blocks))
            offer.until = until

    def running(self, request_id: str) -> bool:
        """Whether there is an offer whose sequence has not ended."""
        offer = self._offers.get(request_id)
        return offer is not None and offer.until is None

    def drop(self, request_id: str) -> None:
        """Withdraw an offer, if there is one, before its sequence gives up its blocks."""
        offer = self._offers.pop(request_id, None)
        if offer is None:
            return
        # The slot changes first: a reader that still finds it unchanged has read held blocks.
        self._publish(offer, LedgerReading(0, 0, 0, 0))
        self._slots.give_back(offer.slot)
        while offer.pinned:
            self._kv.unpin(offer.pinned.pop())

    def expired(self, now: float) -> list[str]:
        """Return the ids of offers whose lease is over."""
        return [i for i, o in self._offers.items() if o.until is not None and o.until <= now]

    def next_expiry(self) -> float | None:
        """Return when the next lease ends; None without leases."""
        return min((o.until for o in self._offers.values() if o.until is not None), default=None)

    def _open(
        self,
        request_id: str,
        blocks: list[int],
        tokens: Sequence[int],
        computed: int,
        cache_scope: str,
        expires: int,
    ) -> bytes:
        """Describe ``blocks``, which are pinned already, and sign the description."""
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
        signed = self._credentials.sign(
            KVSource(
                kind=self._layout.kind,
                agent=self._agent,
                metadata=self._metadata,
                slot=self._slots.address(slot),
                generation=self._generation,
                tokens=len(tokens),
                token_hash=hash_tokens(tokens, cache_scope),
                runs=runs,
                blocks=self._layout.blocks,
                keys=self._layout.keys,
                values=self._layout.values,
                expires=expires,
            )
        )
        if len(signed) > MOST_OFFER_BYTES:  # no reader would take it
            self.drop(request_id)
            return b""
        return signed

    def _publish(self, offer: _Offer, progress: LedgerReading) -> None:
        offer.progress = progress
        self._slots.write(offer.slot, progress)
