"""Decides who gets KV blocks when there are not enough for all."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.policy.protocol import ServiceLevel

PATIENCE_SECONDS = 10.0
"""After this long the first parked sequence of a class holds back later ones of the other class,
and those of other tenants if it stays within the share of its own. A sequence that lost its blocks
to another tenant keeps the next ones at least for as long; each time it loses them, for twice as
long."""
CLAIM_SECONDS = 0.02
"""Least time between two looks for sequences to take blocks from."""


@dataclass(slots=True, eq=False)
class _Parked:
    """A sequence that waits for KV blocks."""

    sequence: Sequence
    short: bool
    since: float
    """Time at which it was parked."""
    new_tokens: int

    def overdue(self, now: float) -> bool:
        """Whether it has waited so long that it holds back others."""
        return not _offline(self.sequence) and now - self.since >= PATIENCE_SECONDS


@dataclass(slots=True)
class _Holder:
    """A sequence with KV blocks."""

    sequence: Sequence
    since: float
    """Time at which it got them."""


class _Place(NamedTuple):
    """Place of a parked sequence in the queue of its class. Places compare in the queue's order."""

    precedence: tuple[int, float]
    order: int
    """Number of sequences parked before it. It breaks all ties."""
    parked: _Parked


class MemoryGate:
    """Reserves KV blocks for prefills in order of precedence within each class, and parks the rest.

    The blocks of a prefill are reserved as a whole before its first chunk, so that one which has
    begun can go on until its memory is taken. Long prefills leave a reserve that only short ones
    may use.

    A later sequence never overtakes a parked one of its own class and tenant. A later sequence of
    the other class may, for PATIENCE_SECONDS. Example: a parked long prefill of 6,000 tokens does
    not hold up shorts that fit into the free blocks, unless they have kept it waiting for 10 s.

    Tenants share the blocks while they contend. Each has an equal share of all, what one does not
    use is lent to the others, and the tenant with the fewest blocks is served first. Who parks
    within its tenant's share gets blocks back from tenants above theirs: those of their least
    entitled sequences, which are prefilled again later. What it got is kept free for its next
    requests for PATIENCE_SECONDS, so that blocks do not go to and fro. So a tenant within its share
    waits at most for what is in flight, and for sequences that have lost their blocks before and
    are protected for a while (see PATIENCE_SECONDS). A sequence that needs more than its tenant's
    share waits until the others leave it enough.

    Offline requests (`ServiceLevel.OFFLINE`) get what all others leave: they hold up nobody while
    they are parked, and give up their blocks for any other one, those first that have the least to
    compute again.

    Args:
        short_reserve: blocks that long prefills may not take.
    """

    def __init__(self, kv: KVManager, short_reserve: int) -> None:
        self._kv = kv
        self._short_reserve = short_reserve
        self._holders: dict[str, _Holder] = {}
        """Sequences with KV blocks, by request id."""
        self._places: dict[str, _Place] = {}
        """Places of parked sequences, by request id."""
        self._queues: dict[tuple[str, bool], list[_Place]] = {}
        """Places by tenant and class, long (False) and short (True), in order. None is empty."""
        self._counts = {False: 0, True: 0}
        """Number of parked sequences of each class."""
        self._tokens = {False: 0, True: 0}
        """New tokens of the parked sequences of each class."""
        self._tenant_tokens: Counter[str] = Counter()
        """New tokens of the parked sequences of each tenant."""
        self._kept: dict[str, tuple[int, float]] = {}
        """Blocks that are kept for tenants which had to claim them, and until when."""
        self._claimed = -CLAIM_SECONDS
        """Time of the last look for sequences to take blocks from."""
        self._parks = 0
        self._refused_at: tuple[int, int, int] | None = None
        """State of the KV memory in which the first of each class found no blocks."""

    def __len__(self) -> int:
        """Return the number of parked sequences."""
        return len(self._places)

    def backlog(self, short: bool) -> tuple[int, int]:
        """Return the number of parked sequences of a class, and their new tokens."""
        return self._counts[short], self._tokens[short]

    def parked_tokens(self, tenant: str) -> int:
        """New tokens that the parked sequences of a tenant brought."""
        return self._tenant_tokens[tenant]

    def reserve(self, sequence: Sequence, short: bool, new_tokens: int, now: float) -> bool:
        """Give ``sequence`` blocks for all its tokens, or park it and return False.

        Sets ``sequence.computed`` to the tokens that the prefix cache provides.

        Args:
            new_tokens: expected new tokens, which count in `backlog` while it is parked.
        """
        if self.try_reserve(sequence, short, now):
            return True
        self._parks += 1
        parked = _Parked(sequence, short, now, new_tokens)
        place = _Place(sequence.precedence, self._parks, parked)
        self._places[sequence.id] = place
        tenant = sequence.request.tenant
        insort(self._queues.setdefault((tenant, short), []), place)
        self._counts[short] += 1
        self._tokens[short] += new_tokens
        self._tenant_tokens[tenant] += new_tokens
        self._refused_at = None
        return False

    def try_reserve(self, sequence: Sequence, short: bool, now: float) -> bool:
        """Give ``sequence`` blocks like `reserve`, but do not park it if there are none."""
        return not self._blocked(sequence, short, now) and self._take(sequence, short, now)

    def unpark(self, now: float) -> list[Sequence]:
        """Return the parked sequences that get their blocks now, in order.

        Repeated calls are cheap: nothing is looked at until memory or the prefix cache changes.
        """
        if not self._places:
            return []
        self._kept = {tenant: kept for tenant, kept in self._kept.items() if kept[1] > now}
        if self._refused_at == self._kv_state():
            return []
        served: list[Sequence] = []
        refused: set[tuple[str, bool]] = set()
        while place := self._first(refused, now):
            parked = place.parked
            if refused and _offline(parked.sequence):
                break
            if self._take(parked.sequence, parked.short, now):
                self._leave(place)
                served.append(parked.sequence)
                continue
            tenant = parked.sequence.request.tenant
            refused.add((tenant, parked.short))
            if parked.overdue(now):
                refused.add((tenant, not parked.short))
                if self._entitled(parked.sequence, self._usage()):
                    break
        self._refused_at = self._kv_state()
        return served

    def overdrawn(self, now: float) -> list[Sequence]:
        """Return sequences that have to give up their blocks, so that `unpark` serves somebody.

        They are offline; or of tenants above their share, and the first parked sequence that stays
        within the share of its tenant needs their blocks. None are returned if these would not be
        enough.
        """
        if not self._places or now - self._claimed < CLAIM_SECONDS:
            return []
        self._claimed = now
        if victims := self._offline_victims():
            return victims
        usage = self._usage()
        if len(usage) < 2:
            return []
        share = self._kv.blocks // len(usage)
        for place in sorted(self._heads(), key=lambda head: self._rank(head, usage, now)):
            parked, tenant = place.parked, place.parked.sequence.request.tenant
            if not self._entitled(parked.sequence, usage):
                continue
            needed = self._kv.blocks_for(len(parked.sequence.tokens))
            spare = 0 if parked.short else self._short_reserve
            victims = self._victims_for(needed + spare, dict(usage), share, now)
            if victims:
                kept, _ = self._kept.get(tenant, (0, 0.0))
                wanted = max(kept, usage[tenant] + needed)
                self._kept[tenant] = wanted, now + PATIENCE_SECONDS
                return victims
        return []

    def release(self, sequence: Sequence) -> None:
        """Free the blocks of ``sequence``, or its place in the queue for some."""
        place = self._places.get(sequence.id)
        if place is not None:
            self._leave(place)
            self._refused_at = None  # it may have held back others
        if self._holders.pop(sequence.id, None) is not None:
            self._kv.release(sequence.table)

    def victim(self, growing: Sequence) -> Sequence | None:
        """Return the sequence whose blocks ``growing`` may take for its next token.

        It is one that no enqueued batch and no transfer writes to: of the tenant that is furthest
        above its share the one of lowest precedence. Within its own tenant, or where nobody is
        above its share, ``growing`` takes the blocks of sequences of lower precedence only. None
        if there are none: then it has to give way itself. Offline sequences give way first, and
        take the blocks of offline ones only.
        """
        others = [
            holder.sequence
            for holder in self._holders.values()
            if not holder.sequence.in_flight and holder.sequence is not growing
        ]
        offline = [sequence for sequence in others if _offline(sequence)]
        if _offline(growing):
            others = offline
        elif offline:
            return min(offline, key=_cost_of_loss)
        usage, mine = self._usage(), growing.request.tenant
        share = self._kv.blocks / max(1, len(usage))
        above = {s.request.tenant for s in others if usage[s.request.tenant] > share}
        if usage[mine] > share:
            above.add(mine)
        if above:
            most = max(above, key=lambda tenant: (usage[tenant], tenant == mine))
            others = [s for s in others if s.request.tenant == most]
        victim = max(others, key=lambda s: s.precedence, default=None)
        if victim is None or (above and victim.request.tenant != mine):
            return victim
        return victim if victim.precedence > growing.precedence else None

    # Inside

    def _offline_victims(self) -> list[Sequence]:
        """Return offline sequences whose blocks are enough for the first other one, or none."""
        heads = [place for place in self._heads() if not _offline(place.parked.sequence)]
        if not heads:
            return []
        parked = min(heads).parked
        needed = self._kv.blocks_for(len(parked.sequence.tokens))
        needed += 0 if parked.short else self._short_reserve
        candidates = [
            holder.sequence
            for holder in self._holders.values()
            if _offline(holder.sequence) and not holder.sequence.in_flight
        ]
        available, victims = self._kv.available, []
        for victim in sorted(candidates, key=_cost_of_loss):
            if available >= needed:
                break
            victims.append(victim)
            available += len(victim.table.blocks)
        return victims if available >= needed else []

    def _usage(self) -> dict[str, int]:
        """Return the blocks of each tenant that has some or waits for some.

        Blocks that sequences share count for each of them.
        """
        usage = {tenant: 0 for tenant, _ in self._queues}
        for holder in self._holders.values():
            tenant = holder.sequence.request.tenant
            usage[tenant] = usage.get(tenant, 0) + len(holder.sequence.table.blocks)
        return usage

    def _heads(self) -> Iterator[_Place]:
        return (queue[0] for queue in self._queues.values())

    def _first(self, refused: set[tuple[str, bool]], now: float) -> _Place | None:
        """Return the parked sequence that goes first, of those that were not refused."""
        heads = [queue[0] for key, queue in self._queues.items() if key not in refused]
        if len(heads) < 2:
            return heads[0] if heads else None
        usage = self._usage()
        return min(heads, key=lambda head: self._rank(head, usage, now))

    def _rank(self, place: _Place, usage: dict[str, int], now: float) -> tuple[float, _Place]:
        """Order of parked sequences: the overdue, then those of tenants with few blocks."""
        parked = place.parked
        if _offline(parked.sequence):
            return inf, place
        if len(usage) < 2:
            return 0.0, place
        if parked.overdue(now) and self._entitled(parked.sequence, usage):
            return -1.0, place
        return usage[parked.sequence.request.tenant], place

    def _entitled(self, sequence: Sequence, usage: dict[str, int]) -> bool:
        """Return whether a parked sequence would stay within the share of its tenant."""
        needed = self._kv.blocks_for(len(sequence.tokens))
        return usage[sequence.request.tenant] + needed <= self._kv.blocks // len(usage)

    def _victims_for(
        self, needed: int, usage: dict[str, int], share: int, now: float
    ) -> list[Sequence]:
        """Return sequences of tenants above their share, whose blocks are enough with free ones."""
        candidates = [
            holder.sequence
            for holder in self._holders.values()
            if not holder.sequence.in_flight and not self._protected(holder, now)
        ]
        candidates.sort(key=lambda s: s.precedence)
        victims: list[Sequence] = []
        available = self._kv.available
        while available < needed:
            above = [s for s in candidates if usage[s.request.tenant] > share]
            if not above:
                return []
            most = max(usage[s.request.tenant] for s in above)
            victim = [s for s in above if usage[s.request.tenant] == most][-1]
            candidates.remove(victim)
            victims.append(victim)
            usage[victim.request.tenant] -= len(victim.table.blocks)
            available += len(victim.table.blocks)
        for victim in victims:
            victim.claims += 1
        return victims

    def _protected(self, holder: _Holder, now: float) -> bool:
        """Return whether a sequence that has lost its blocks before keeps these for now."""
        claims = holder.sequence.claims
        return bool(claims) and now - holder.since < PATIENCE_SECONDS * 2 ** min(claims - 1, 30)

    def _kept_from(self, sequence: Sequence, now: float) -> int:
        """Return the free blocks that a sequence has to leave for tenants that have claimed them.

        Those are none if it stays within the share of its tenant.
        """
        if not self._kept:
            return 0
        usage, mine = self._usage(), sequence.request.tenant
        usage.setdefault(mine, 0)
        share = self._kv.blocks // len(usage.keys() | self._kept.keys())
        if usage[mine] + self._kv.blocks_for(len(sequence.tokens)) <= share:
            return 0
        return sum(
            max(0, min(blocks, share) - usage.get(tenant, 0))
            for tenant, (blocks, until) in self._kept.items()
            if tenant != mine and until > now
        )

    def _kv_state(self) -> tuple[int, int, int]:
        """Return a value that changes whenever a refused reservation could succeed."""
        return self._kv.version, self._kv.available, len(self._kept)

    def _leave(self, place: _Place) -> None:
        """Take a sequence out of its queue."""
        parked = place.parked
        del self._places[parked.sequence.id]
        tenant = parked.sequence.request.tenant
        queue = self._queues[tenant, parked.short]
        del queue[bisect_left(queue, place)]
        if not queue:
            del self._queues[tenant, parked.short]
        self._counts[parked.short] -= 1
        self._tokens[parked.short] -= parked.new_tokens
        self._tenant_tokens[tenant] -= parked.new_tokens
        if not self._tenant_tokens[tenant]:
            del self._tenant_tokens[tenant]

    def _blocked(self, sequence: Sequence, short: bool, now: float) -> bool:
        """Return whether a parked sequence goes before ``sequence``."""
        if not self._queues:
            return False
        mine = sequence.request.tenant
        usage: dict[str, int] | None = None
        for (tenant, kind), queue in self._queues.items():
            head = queue[0]
            if _offline(head.parked.sequence) != _offline(sequence):
                if _offline(sequence):
                    return True
                continue
            overdue = head.parked.overdue(now)
            if tenant == mine:
                if head.precedence <= sequence.precedence and (kind == short or overdue):
                    return True
                continue
            usage = usage or self._usage()
            if overdue and self._entitled(head.parked.sequence, usage):
                return True
            if kind != short:
                continue
            theirs = (usage[tenant], head.precedence)
            if theirs <= (usage.get(mine, 0), sequence.precedence):
                return True
        return False

    def _take(self, sequence: Sequence, short: bool, now: float) -> bool:
        """Reserve blocks for all tokens of ``sequence``. Returns False if too few are available."""
        spare = max(0 if short else self._short_reserve, self._kept_from(sequence, now))
        cached = self._kv.reserve(
            sequence.tokens, sequence.table, spare=spare, most_cached=sequence.reusable
        )
        if cached is None:
            return False
        self._holders[sequence.id] = _Holder(sequence, now)
        tenant = sequence.request.tenant
        if tenant in self._kept:
            self._kept[tenant] = self._kept[tenant][0], now + PATIENCE_SECONDS
        sequence.computed = cached
        if sequence.cached_tokens is None:
            sequence.cached_tokens = cached
        return True


def _offline(sequence: Sequence) -> bool:
    return sequence.request.service is ServiceLevel.OFFLINE


def _cost_of_loss(sequence: Sequence) -> tuple[int, float]:
    """Order of offline sequences by what they lose with their blocks; of equals, the newest."""
    return sequence.computed, -sequence.request.arrival
