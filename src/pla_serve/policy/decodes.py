"""Requests that want one token after another, in turn, with places shared between tenants."""

from __future__ import annotations

from collections import OrderedDict

from pla_serve.policy.protocol import Chunk

MOST_TURNS = 1024
"""Tenants whose turns are remembered; with more of them all turns begin anew."""


class DecodePool:
    """Decoding requests; the one stepped least recently goes first, so nobody starves.

    If more are ready than a batch has places, places are shared between tenants: each gets an equal
    part of them, and what one does not need goes to the others. So a tenant with n ready requests
    gets at least ``min(n, places // tenants)`` of them, whatever the others have. Where there are
    fewer places than tenants, tenants take turns.

    Every operation is O(1) a request that it names; `take` is O(tenants) more where places are
    short.
    """

    def __init__(self) -> None:
        self._rings: dict[str, OrderedDict[str, Chunk]] = {}
        """Ready requests by tenant."""
        self._turns: dict[str, int] = {}
        """When each tenant got an odd place last, counted in odd places."""
        self._turn = 0
        self._tenants: dict[str, str] = {}
        """Tenants of requests, ready or in flight, where it is not the empty one."""
        self._flying: dict[str, Chunk] = {}
        self._count = 0
        self._ready_context = 0

    def __len__(self) -> int:
        """Requests ready for a step; those in flight do not count."""
        return self._count

    @property
    def total(self) -> int:
        """Requests that decode, in flight or not."""
        return self._count + len(self._flying)

    @property
    def mean_context(self) -> float:
        """Cached tokens of a ready request, on average."""
        return self._ready_context / self._count if self._count else 0.0

    def start(self, request_id: str, context: int, tenant: str = "") -> None:
        """Add a request at the end of the turn; one that is here already starts anew."""
        self.discard(request_id)
        if tenant:
            self._tenants[request_id] = tenant
        self._push(tenant, Chunk(request_id, 1, context))

    def discard(self, request_id: str) -> None:
        """Forget a request, in flight or not; unknown ids are ignored."""
        tenant = self._tenants.pop(request_id, "")
        if self._flying.pop(request_id, None) is not None:
            return
        ring = self._rings.get(tenant)
        chunk = None if ring is None else ring.pop(request_id, None)
        if ring is None or chunk is None:
            return
        self._count -= 1
        self._ready_context -= chunk.history
        if not ring:
            del self._rings[tenant]

    def take(self, places: int) -> list[Chunk]:
        """Hand out the next step of at most ``places`` requests."""
        if self._count <= places:
            chunks = [chunk for ring in self._rings.values() for chunk in ring.values()]
            self._rings.clear()
            self._count = self._ready_context = 0
        else:
            chunks = []
            for tenant, part in self._parts(places):
                ring = self._rings[tenant]
                chunks += [ring.popitem(last=False)[1] for _ in range(part)]
                if not ring:
                    del self._rings[tenant]
            self._count -= len(chunks)
            self._ready_context -= sum([chunk[2] for chunk in chunks])
        self._flying.update([(chunk[0], chunk) for chunk in chunks])
        return chunks

    def settle(self, chunks: tuple[Chunk, ...]) -> None:
        """These steps were computed; requests that were removed meanwhile stay forgotten."""
        flying, tenants = self._flying, self._tenants
        for chunk in chunks:
            request_id, _, history, _ = chunk
            if flying.get(request_id) == chunk:
                del flying[request_id]
                self._push(tenants.get(request_id, ""), Chunk(request_id, 1, history + 1))

    def _push(self, tenant: str, chunk: Chunk) -> None:
        ring = self._rings.get(tenant)
        if ring is None:
            ring = self._rings[tenant] = OrderedDict()
        ring[chunk[0]] = chunk
        self._count += 1
        self._ready_context += chunk[2]

    def _parts(self, places: int) -> list[tuple[str, int]]:
        """Places of each tenant, where more requests are ready than there are places."""
        if len(self._rings) == 1:
            return [(next(iter(self._rings)), places)]
        sizes = {tenant: len(ring) for tenant, ring in self._rings.items()}
        share, left, others = 0, places, len(sizes)
        for size in sorted(sizes.values()):
            share = left // others
            if size > share:
                break
            left, others = left - size, others - 1
        parts = {tenant: min(size, share) for tenant, size in sizes.items()}
        odd = places - sum(parts.values())
        wanting = [tenant for tenant in sizes if parts[tenant] < sizes[tenant]]
        wanting.sort(key=lambda tenant: self._turns.get(tenant, 0))
        if len(self._turns) > MOST_TURNS:
            self._turns.clear()
        for tenant in wanting[:odd]:
            parts[tenant] += 1
            self._turn += 1
            self._turns[tenant] = self._turn
        return [(tenant, part) for tenant, part in parts.items() if part]
