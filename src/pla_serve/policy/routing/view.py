"""State of all instances as a router knows it, in arrays so that a thousand compare at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pla_serve.policy.pools.protocol import Pool
from pla_serve.policy.routing.request import FleetModel, RouteRequest

if TYPE_CHECKING:
    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]

TIE = 1e-3
"""Weight of the long work where the short work decides: of two instances with equal short work, the
one with less long work is chosen."""


ARRAYS = ("requests", "tokens", "assigned", "short_waiting", "ready", "express_ready")
"""Attributes of `FleetView` that hold a number for each instance."""


@dataclass(slots=True)
class Charge:
    """A dispatched request, as charged to the account of its instance."""

    entry: InstanceView
    tokens: int
    """New tokens."""
    seconds: float
    """Predicted seconds of its prefill."""
    short: bool
    at: float
    """Time of dispatch."""


@dataclass(slots=True, eq=False)
class InstanceView:
    """One instance."""

    id: str
    index: int
    pool: Pool
    waiting: dict[str, Charge] = field(default_factory=dict)
    """Requests that have no first token yet, in order of dispatch."""
    running: set[str] = field(default_factory=set)
    """Requests that have their first token and are not finished."""
    work: float = 0.0
    """Predicted seconds of the prefills of all waiting requests."""
    express_work: float = 0.0
    """Part of ``work`` that short requests make up."""


class FleetView:
    """Instances by index, and the accounts of what was dispatched to them.

    An instance is *ready* at the time at which all its prefills are predicted to be done;
    ``express_ready`` is the same for its short ones alone, when those do not wait for long ones
    (`FleetModel.express`). Work is charged at dispatch, taken off when it is done, and corrected by
    reports. If an instance should be ready by now and is not, its work takes longer than predicted.
    The rest is then assumed to take as long as the instance is late already; for short work only
    beyond `FleetModel.grace_seconds`.
    """

    def __init__(self, model: FleetModel) -> None:
        self.model = model
        self.entries: list[InstanceView] = []
        self.requests: Counts = np.zeros(0, np.int64)
        """Dispatched and not finished."""
        self.tokens: Counts = np.zeros(0, np.int64)
        """New tokens dispatched and not prefilled."""
        self.assigned: Counts = np.zeros(0, np.int64)
        """New tokens ever dispatched; one that joins starts level with the least."""
        self.short_waiting: Counts = np.zeros(0, np.int64)
        """Short requests dispatched and not prefilled."""
        self.ready: Floats = np.zeros(0)
        self.express_ready: Floats = np.zeros(0)
        self.waiting = 0
        """Requests without their first token, on all instances."""
        self._by_id: dict[str, InstanceView] = {}
        self._members: dict[Pool, Counts] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._by_id

    def entry(self, instance_id: str) -> InstanceView:
        """Return the account of an instance.

        Raises:
            KeyError: the router knows no such instance.
        """
        try:
            return self._by_id[instance_id]
        except KeyError:
            raise KeyError(f"the router knows no instance {instance_id!r}") from None

    def join(self, instance_id: str, pool: Pool, now: float) -> None:
        """Add an instance without work."""
        entry = InstanceView(instance_id, len(self.entries), pool)
        self.entries.append(entry)
        self._by_id[instance_id] = entry
        least = int(self.assigned.min()) if len(self.assigned) else 0
        self.requests = np.append(self.requests, 0)
        self.tokens = np.append(self.tokens, 0)
        self.assigned = np.append(self.assigned, least)
        self.short_waiting = np.append(self.short_waiting, 0)
        self.ready = np.append(self.ready, now)
        self.express_ready = np.append(self.express_ready, now)
        self._members.clear()

    def leave(self, entry: InstanceView) -> None:
        """Forget an instance; the indices behind it fall by one."""
        self.waiting -= len(entry.waiting)
        del self._by_id[entry.id]
        del self.entries[entry.index]
        for name in ARRAYS:
            setattr(self, name, np.delete(getattr(self, name), entry.index))
        for later in self.entries[entry.index :]:
            later.index -= 1
        self._members.clear()

    def without(self, ids: Collection[str]) -> FleetView:
        """Copy of the view without some instances, to choose by; nothing is charged to the copy."""
        rest = [entry for entry in self.entries if entry.id not in ids]
        kept = [entry.index for entry in rest]
        view = FleetView(self.model)
        view.entries = [replace(entry, index=index) for index, entry in enumerate(rest)]
        view._by_id = {entry.id: entry for entry in view.entries}
        view.waiting = sum(len(entry.waiting) for entry in rest)
        for name in ARRAYS:
            setattr(view, name, getattr(self, name)[kept])
        return view

    def change_pool(self, entry: InstanceView, pool: Pool) -> None:
        """Move an instance, with all that it holds, to ``pool``."""
        entry.pool = pool
        self._members.clear()

    def members(self, pool: Pool) -> Counts:
        """Indices of the instances of ``pool`` and of the MIXED ones, rising."""
        found = self._members.get(pool)
        if found is None:
            found = np.array(
                [e.index for e in self.entries if e.pool in (pool, Pool.MIXED)], np.int64
            )
            self._members[pool] = found
        return found

    def count(self, pool: Pool | None) -> int:
        """Number of members of ``pool``."""
        return len(self.entries) if pool is None else len(self.members(pool))

    def holders(self, request: RouteRequest, pool: Pool | None) -> Iterator[tuple[int, int]]:
        """Index and cached tokens of those members that hold more of the prompt than all do.

        At least one token of a prompt is always new: it yields the first token of the answer.
        """
        most = request.prompt_tokens - 1
        for instance_id, cached in request.cached.items():
            entry = self._by_id.get(instance_id)
            if entry is None or cached <= request.common or most <= request.common:
                continue
            if pool is None or entry.pool is pool or entry.pool is Pool.MIXED:
                yield entry.index, min(cached, most)

    def most_cached(self, request: RouteRequest, pool: Pool | None) -> int:
        """Return the most leading tokens of the prompt that a member has cached."""
        everywhere = min(request.common, request.prompt_tokens - 1)
        return max((cached for _, cached in self.holders(request, pool)), default=everywhere)

    def least(self, values: Floats | Counts, pool: Pool | None) -> int:
        """Return the member with the smallest value, the first one if several have it."""
        if pool is None:
            return int(values.argmin())
        members = self.members(pool)
        return int(members[values[members].argmin()])

    def ties(self, values: Floats | Counts, pool: Pool | None) -> Counts:
        """All members with the least value."""
        if pool is None:
            return np.flatnonzero(values == values.min())
        members = self.members(pool)
        own = values[members]
        tied: Counts = members[own == own.min()]
        return tied

    def soonest(self, short: bool, pool: Pool | None, now: float) -> int:
        """Return the member that would begin a request first; of idle members the longest idle."""
        ready, waiting, grace = self._account(short)
        expected: Floats = np.where((waiting > 0) & (ready + grace < now), 2 * now - ready, ready)
        if ready is self.express_ready:
            expected = np.maximum(expected, now) + TIE * self.ready
        return self.least(expected, pool)

    def wait(self, index: int, short: bool, now: float) -> float:
        """Return the predicted seconds until an instance begins a short or a long request."""
        ready, waiting, grace = self._account(short)
        left = float(ready[index]) - now
        if left < -grace and waiting[index]:
            return -left
        return max(0.0, left)

    def _account(self, short: bool) -> tuple[Floats, Counts, float]:
        """Return what delays a short or a long request, for each instance.

        Returns:
            The time at which the work before it is predicted to be done, the amount of that work
            (requests or tokens; 0 if none), and the seconds that it may be late.
        """
        if short and self.model.express:
            return self.express_ready, self.short_waiting, self.model.grace_seconds
        return self.ready, self.tokens, 0.0

    def idle(self, pool: Pool, now: float) -> Counts:
        """Members without any prefill."""
        members = self.members(pool)
        free: Counts = members[(self.tokens[members] == 0) & (self.ready[members] <= now)]
        return free

    def is_short(self, request: RouteRequest, new_tokens: int) -> bool:
        """Whether a request with so many new tokens is short, as instances see it."""
        return not request.bulk and new_tokens <= self.model.boundary_tokens

    def charge(self, entry: InstanceView, request_id: str, charge: Charge) -> None:
        """Put a dispatched request on an account."""
        index, seconds, now = entry.index, charge.seconds, charge.at
        entry.waiting[request_id] = charge
        self.waiting += 1
        entry.work += seconds
        self.requests[index] += 1
        self.tokens[index] += charge.tokens
        self.assigned[index] += charge.tokens
        self.ready[index] = max(float(self.ready[index]), now) + seconds
        if charge.short:
            self.short_waiting[index] += 1
            entry.express_work += seconds
            self.express_ready[index] = max(float(self.express_ready[index]), now) + seconds

    def discharge(self, entry: InstanceView, charge: Charge, now: float) -> None:
        """Take a request that was prefilled, or never will be, off the account of its instance."""
        index = entry.index
        self.waiting -= 1
        self.tokens[index] -= charge.tokens
        entry.work = entry.work - charge.seconds if entry.waiting else 0.0
        self.ready[index] = _corrected(float(self.ready[index]), entry.work, now)
        if charge.short:
            self.short_waiting[index] -= 1
            entry.express_work -= charge.seconds
            if not entry.waiting or entry.express_work < 0:
                entry.express_work = 0.0
            self.express_ready[index] = _corrected(
                float(self.express_ready[index]), entry.express_work, now
            )

    def correct(
        self, entry: InstanceView, seconds: float, express_seconds: float, at: float
    ) -> None:
        """Take over the instance's own prediction of time ``at``; later dispatches are added."""
        for charge in reversed(entry.waiting.values()):
            if charge.at <= at:
                break
            seconds += charge.seconds
            if charge.short:
                express_seconds += charge.seconds
        self.ready[entry.index] = at + seconds
        self.express_ready[entry.index] = at + express_seconds


def _corrected(ready: float, work: float, now: float) -> float:
    """Limit ``ready`` to the range from now to the end of all work that is known to wait."""
    return min(max(ready, now), now + work)
