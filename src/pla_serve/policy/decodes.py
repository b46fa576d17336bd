"""Requests that want one token after another, in turn, with places shared between tenants."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from pla_serve.policy.protocol import Chunk

LOOSE_TARGET = 1.0
"""A request without a TPOT target of its own has this one, in seconds, where the caller knows no
better one. Those with shorter targets go before it, so it waits for a second and some steps."""

Owner = tuple[str, float | None]
"""Tenant of a request, and its own TPOT target in seconds."""
NOBODY: Owner = ("", None)

Ring = OrderedDict[str, Chunk]
"""Ready requests, the one whose last token is oldest first."""


@dataclass(slots=True)
class Load:
    """Ready requests of one tenant."""

    requests: int = 0
    context: int = 0
    """Their cached tokens in all."""
    rings: dict[float | None, Ring] = field(default_factory=dict)
    """The requests themselves by TPOT target; no ring is empty."""


class DecodePool:
    """Decoding requests; the one whose next token is due first goes first, so nobody starves.

    A token is due one TPOT target after the one before it. Where all requests have the same target,
    or none, the one stepped least recently goes first. A request without a target has a finite one
    all the same, so targets of others keep nobody out: among n ready requests of t tenants, one
    that is due is handed out in at most ``n * ceil(t / places)`` calls of `take`.

    If more are ready than a batch has places, places are shared between tenants: each gets an equal
    part of them, and what one does not need goes to the others. So a tenant with n ready requests
    gets at least ``min(n, places // tenants)`` of them, whatever the others have. Where there are
    fewer places than tenants, tenants take turns; a tenant that comes anew is last.

    Every operation is O(1) a request that it names; `first_due` is O(tenants and targets), and
    `take` is so more where places are short. Times must not fall from call to call.
    """

    def __init__(self) -> None:
        self._loads: OrderedDict[str, Load] = OrderedDict()
        """Ready requests by tenant; the tenant first that got an odd place longest ago."""
        self._owners: dict[str, Owner] = {}
        """Tenant and target of requests, ready or in flight, that have either."""
        self._flying: dict[str, Chunk] = {}
        self._times: dict[str, float] = {}
        """When each request got its last token."""
        self._targets: dict[float | None, int] = {}
        """Number of requests, ready or in flight, by target."""
        self._count = 0
        self._ready_context = 0
        self._context = 0

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

    @property
    def context(self) -> int:
        """Cached tokens of all requests, in flight or not."""
        return self._context

    @property
    def loads(self) -> Mapping[str, Load]:
        """The ready requests of each tenant that has some."""
        return self._loads

    def within(self, tpot: float, default: float) -> int:
        """Return how many requests, in flight or not, have a target of at most ``tpot``.

        ``default`` as in `first_due`.
        """
        return sum(
            count
            for target, count in self._targets.items()
            if (default if target is None else target) <= tpot
        )

    def start(
        self,
        request_id: str,
        context: int,
        now: float,
        tenant: str = "",
        tpot: float | None = None,
    ) -> None:
        """Add a request that got a token at ``now``; one that is here already starts anew."""
        self.discard(request_id)
        owner = (tenant, tpot)
        if owner != NOBODY:
            self._owners[request_id] = owner
        self._context += context
        self._targets[tpot] = self._targets.get(tpot, 0) + 1
        self._push(owner, Chunk(request_id, 1, context), now)

    def discard(self, request_id: str) -> None:
        """Forget a request, in flight or not; unknown ids are ignored."""
        tenant, tpot = self._owners.pop(request_id, NOBODY)
        self._times.pop(request_id, None)
        chunk = self._flying.pop(request_id, None)
        if chunk is not None:
            self._context -= chunk.history
            self._drop_target(tpot)
            return
        load = self._loads.get(tenant)
        ring = None if load is None else load.rings.get(tpot)
        chunk = None if ring is None else ring.pop(request_id, None)
        if chunk is None:
            return
        self._context -= chunk.history
        self._drop_target(tpot)
        self._leave(tenant, tpot, chunk)

    def first_due(self, default: float, least: float = 0.0) -> float:
        """Return the time at which the first token of a ready request is due; infinite for none.

        Args:
            default: seconds between two tokens of a request without a target of its own.
            least: a shorter target counts as this.
        """
        first, times = inf, self._times
        for load in self._loads.values():
            for tpot, ring in load.rings.items():
                target = max(least, default if tpot is None else tpot)
                first = min(first, times[next(iter(ring))] + target)
        return first

    def take(self, places: int, default: float = LOOSE_TARGET) -> list[Chunk]:
        """Hand out the next step of at most ``places`` requests; ``default`` as in `first_due`."""
        if self._count <= places:
            chunks = [
                chunk
                for load in self._loads.values()
                for ring in load.rings.values()
                for chunk in ring.values()
            ]
            self._loads.clear()
            self._count = self._ready_context = 0
        else:
            chunks = []
            for tenant, part in self._parts(places):
                chunks += self._take_of(tenant, part, default)
        self._flying.update([(chunk[0], chunk) for chunk in chunks])
        return chunks

    def settle(self, chunks: tuple[Chunk, ...], now: float) -> None:
        """Note that these steps were computed. Requests removed meanwhile stay forgotten."""
        flying, owners = self._flying, self._owners
        for chunk in chunks:
            request_id, _, history, _ = chunk
            if flying.get(request_id) == chunk:
                del flying[request_id]
                self._context += 1
                owner = owners.get(request_id, NOBODY)
                self._push(owner, Chunk(request_id, 1, history + 1), now)

    def _push(self, owner: Owner, chunk: Chunk, now: float) -> None:
        tenant, tpot = owner
        load = self._loads.get(tenant)
        if load is None:
            load = self._loads[tenant] = Load()
        ring = load.rings.get(tpot)
        if ring is None:
            ring = load.rings[tpot] = OrderedDict()
        ring[chunk[0]] = chunk
        self._times[chunk[0]] = now
        self._count += 1
        self._ready_context += chunk[2]
        load.requests += 1
        load.context += chunk[2]

    def _take_of(self, tenant: str, part: int, default: float) -> list[Chunk]:
        """Take ``part`` requests of one tenant out of its rings, by due time."""
        rings, times = self._loads[tenant].rings, self._times
        chunks = []
        for _ in range(part):
            tpot = next(iter(rings))
            if len(rings) > 1:
                tpot = min(
                    rings,
                    key=lambda key: (
                        times[next(iter(rings[key]))] + (default if key is None else key)
                    ),
                )
            chunk = rings[tpot].popitem(last=False)[1]
            self._leave(tenant, tpot, chunk)
            chunks.append(chunk)
        return chunks

    def _drop_target(self, tpot: float | None) -> None:
        left = self._targets[tpot] - 1
        if left:
            self._targets[tpot] = left
        else:
            del self._targets[tpot]

    def _leave(self, tenant: str, tpot: float | None, chunk: Chunk) -> None:
        """Count off a request that was taken out of this ring."""
        self._count -= 1
        self._ready_context -= chunk.history
        load = self._loads[tenant]
        load.requests -= 1
        load.context -= chunk.history
        if not load.rings[tpot]:
            del load.rings[tpot]
            if not load.rings:
                del self._loads[tenant]

    def _parts(self, places: int) -> list[tuple[str, int]]:
        """Places of each tenant, where more requests are ready than there are places."""
        if len(self._loads) == 1:
            return [(next(iter(self._loads)), places)]
        sizes = {tenant: load.requests for tenant, load in self._loads.items()}
        share, left, others = 0, places, len(sizes)
        for size in sorted(sizes.values()):
            share = left // others
            if size > share:
                break
            left, others = left - size, others - 1
        parts = {tenant: min(size, share) for tenant, size in sizes.items()}
        odd = places - sum(parts.values())
        wanting = [tenant for tenant in sizes if parts[tenant] < sizes[tenant]]
        for tenant in wanting[:odd]:
            parts[tenant] += 1
            self._loads.move_to_end(tenant)
        return [(tenant, part) for tenant, part in parts.items() if part]
