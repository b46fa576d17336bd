"""Bounds the time of express batches while several tenants are served.

All requests of a batch wait for its end. Equal places (`decodes.DecodePool`) and equal shares of
prefill time (`tenants.TenantShares`) do not bound that time: one stream beside 63 of another
tenant gets a token as often as they do, and as late.

The rule: while t tenants have express work, a batch takes at most t times as long as all that is
ready of any one of them would take alone. So each tenant gets a t-th of the device in every batch,
not only on average. Tenants with equal work are never limited by it: they share launches, so that
together they take less than t times as long as one of them alone.

Example: a launch takes 10 ms and a decode step adds 1 ms. Tenant "a" has 2 streams, "b" has 62.
One batch of all would take 74 ms, and "a" alone 12 ms. So batches take at most 24 ms: the 2 streams
of "a" in each, and 12 of "b" in turn. "b" gets 500 tokens a second beside "a", and 838 without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from math import floor

from pla_serve.policy.book import RequestBook
from pla_serve.policy.cost import CostModel
from pla_serve.policy.decodes import Load

PRESENT_SECONDS = 10.0
"""For so long a tenant without work still counts, as one with a launch of work, if only one other
has some: when it comes back, the batch under way is short."""
MOST_PRESENT = 1024
"""So many tenants are remembered for that; with more of them all are forgotten."""
LEAST_PIECE = 16
"""A prefill is not cut to fewer tokens than these, so that none is cut to single ones."""


@dataclass(frozen=True, slots=True)
class BatchLimit:
    """What one express batch may take."""

    seconds: float
    """The whole batch takes at most so long."""
    tokens: int
    """All prefills in it have at most so many."""
    each: int
    """The prefills of one tenant have at most so many."""
    steps: int
    """For so many decode steps time is kept beside the prefills."""


class TenantTime:
    """Says how long the next express batch may be."""

    def __init__(self, book: RequestBook) -> None:
        self._book = book
        self._seen: OrderedDict[str, float] = OrderedDict()
        """When each tenant last had work, the one first that has had none for longest."""

    def limit(self, now: float) -> BatchLimit | None:
        """Return the limit of the batch that begins at ``now``; None while there is one tenant.

        O(tenants with work) in time.
        """
        book = self._book
        streams, prefills = book.decodes.loads, book.short_loads
        ready = dict.fromkeys((*streams, *prefills))  # in an order that does not depend on hashes
        self._note(ready, now)
        if len(self._seen) < 2:
            return None
        count = max(2, len(ready))
        cost, launch = book.cost, book.cost.profile.per_launch
        alone = [launch] if len(ready) < 2 else []
        steps: dict[str, float] = {}
        for tenant in ready:
            own = launch
            if load := streams.get(tenant):
                steps[tenant] = _step_seconds(cost, load)
                own += steps[tenant]
            if prefill := prefills.get(tenant):
                own += prefill.seconds(cost, 0)
            alone.append(own)
        seconds = max(count * min(alone), cost.work_seconds(1, 1, 1, 1, 1))
        part = (seconds - launch) / count
        kept, kept_seconds = 0, 0.0
        for tenant, took in steps.items():
            most = part / 2 if tenant in prefills else part
            share = min(1.0, most / took) if took else 0.0
            kept += floor(share * streams[tenant].requests)
            kept_seconds += share * took
        tokens = max(LEAST_PIECE, int((seconds - launch - kept_seconds) / self._per_token()))
        waiting = len(prefills)
        each = tokens if waiting < 2 else max(LEAST_PIECE, -(-tokens // waiting))
        return BatchLimit(seconds, tokens, each, kept)

    def _per_token(self) -> float:
        profile = self._book.cost.profile
        return max(profile.per_token + profile.per_kv, 1e-12)

    def _note(self, present: Iterable[str], now: float) -> None:
        """Note who has work, and forget those who have had none for PRESENT_SECONDS."""
        seen = self._seen
        if len(seen) > MOST_PRESENT:
            seen.clear()
        for tenant in present:
            seen[tenant] = now
            seen.move_to_end(tenant)
        while seen and now - next(iter(seen.values())) > PRESENT_SECONDS:
            seen.popitem(last=False)


def _step_seconds(cost: CostModel, load: Load) -> float:
    """Return what one token for each stream of a tenant adds to a batch."""
    count, context = load.requests, load.context
    return cost.work_seconds(count, context, context + count, count, 0)
