"""Shares of prefill time between tenants, the owners of API keys; for every policy alike.

A policy orders the prefills that are in its queues. While several tenants have unfinished prefills,
a tenant's prefills enter the queues only as its share allows, and wait outside until then: they are
*held*. So a flood of one tenant, however urgent its priorities are, stays before the door, and a
newcomer of another tenant competes with a bounded amount of it. With a single tenant nothing is
ever held, and every decision is what it would be without this module.

The rule is start-time fair queueing (Goyal, Vin and Cheng, 1996) in predicted seconds, with one
account for each tenant:

- A prefill is charged to its tenant's account, as a whole, when it enters a queue.
- The next one enters only while less than the *window* of the tenant's charges is unserved, and
  while its account is at most a window ahead of the lowest account of a tenant with work.
- A tenant that comes (back) starts level with the lowest account, or from its own if that is
  higher. Nobody saves up a claim by being idle, and nobody loses a debt by leaving for a moment.

Bounds, with w the window and r the largest prefill, both in predicted seconds:

- While two tenants both have prefills waiting, the seconds served to them differ by at most
  ``4 * (w + r)``, over any stretch of time.
- The first prefill of a tenant enters at once, finds at most ``w + r`` seconds of each other tenant
  in the queues, and is passed by at most ``w + r`` and its own seconds of each.

Example: tenant "a" queues 1,000 prompts of 0.1 s, then "b" sends one. With a window of 0.4 s at
most 5 prompts of "a" stay in the queues; under first come, first served, "b" waits for 0.5 s
instead of 100 s.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from pla_serve.policy.pending import Pending
from pla_serve.policy.queues import PrefillQueue, arrival_rank

RELEASED_AT_ONCE = 64
"""Held prefills that enter the queues at one event once their tenant is alone: enough to be done
with 10,000 in seconds, few enough not to be noticed in a decision."""
MOST_RAISED = 8
"""Prefills of a backlog that are held at a time."""
RAISED = -1
"""`Pending.entered` of prefills that are held and were in a backlog."""
MOST_DEBTS = 64
"""Debts of tenants without work that are kept before those that are paid are looked for."""


class HeldPrefills:
    """Prefills outside the queues: the most urgent first, then by arrival."""

    def __init__(self) -> None:
        self._entries: list[tuple[tuple[float, ...], int, Pending]] = []
        """The first one last, so that it is taken in O(1)."""

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, request: Pending) -> None:
        """Hold a request."""
        request.held = True
        insort(self._entries, (arrival_rank(request), -request.order, request))

    def discard(self, request: Pending) -> None:
        """Hold a request no more."""
        request.held = False
        key = (arrival_rank(request), -request.order)
        del self._entries[bisect_left(self._entries, key)]

    def pop(self) -> Pending:
        """Hold the first one no more, and return it."""
        request = self._entries.pop()[-1]
        request.held = False
        return request


@dataclass(slots=True, eq=False)
class Account:
    """One tenant with unfinished prefills."""

    tenant: str
    charged: float
    """Predicted seconds that were charged to it, from a level that all accounts share."""
    unfinished: int = 0
    unserved: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    """Of its charges, the seconds that have not run; by lane."""
    held: dict[bool, HeldPrefills] = field(
        default_factory=lambda: {False: HeldPrefills(), True: HeldPrefills()}
    )
    """Prefills that wait outside the queues; by lane."""
    backlog: dict[bool, dict[int, PrefillQueue]] = field(
        default_factory=lambda: {False: {}, True: {}}
    )
    """Prefills that were in the queues when the tenant was alone; by lane, then by the round in
    which they had entered."""
    raised: dict[bool, dict[str, Pending]] = field(default_factory=lambda: {False: {}, True: {}})
    """Those held that came from a backlog; by lane, then by id."""
    key: tuple[float, str] | None = None
    """Place of the account among those that may admit a request."""

    def lane(self, window: float) -> bool | None:
        """Lane from which a prefill may enter; short ones first. None if nothing may."""
        for lane in (True, False):
            unserved = self.unserved[lane]
            if self.held[lane] and (unserved <= 0 or unserved < window):
                return lane
        return None


class TenantShares:
    """Decides when prefills enter the queues of a policy.

    No call handles more than a bounded number of prefills, however many wait. When a second tenant
    comes, the whole queue of the first one is set aside as its *backlog*, at once and in its order,
    and a few prefills at a time are taken from there to be held.

    Args:
        queues: the policy's queues by lane. Two queues are two lanes, short (True) and long
            prefills, which are let in separately. A single one takes both.
        window: returns the seconds that tenants may be apart, which may change with the cost model.
        price: predicted seconds that a prefill adds to a batch.
        flying: prefills with a chunk in flight that belong to these queues.
    """

    def __init__(
        self,
        queues: Mapping[bool, PrefillQueue],
        window: Callable[[], float],
        price: Callable[[Pending], float],
        flying: Callable[[], Iterable[Pending]],
    ) -> None:
        self._queues = queues
        self._window = window
        self._price = price
        self._flying = flying
        self._accounts: dict[str, Account] = {}
        self._order: list[tuple[float, str]] = []
        """All accounts, the lowest first. It is kept only while there are several."""
        self._ready: list[tuple[float, str]] = []
        """Accounts from which a held prefill may enter a queue, the lowest first."""
        self._debts: dict[str, float] = {}
        """Accounts of tenants that left while they were ahead."""
        self._charged: dict[str, Pending] = {}
        """Prefills with a charge, by id: about a window of each tenant."""
        self._holding = False
        """Whether prefills may be held."""
        self._round = 0
        """How often queues were set aside. `Pending.entered` is the round of its entry."""
        self._latest = 0.0
        """Latest arrival: the time, as far as it is known here."""

    @property
    def tenants(self) -> int:
        """Number of tenants with unfinished prefills."""
        return len(self._accounts)

    @property
    def outside(self) -> int:
        """Number of prefills that wait outside the queues."""
        return sum(
            len(account.held[lane]) + sum(map(len, account.backlog[lane].values()))
            for account in self._accounts.values()
            for lane in self._queues
        )

    def charged(self, tenant: str) -> float:
        """Return the account of a tenant with unfinished prefills, in seconds."""
        return self._accounts[tenant].charged

    def add(self, request: Pending) -> None:
        """Put a new prefill into its queue, or hold it until its tenant may go on (`release`)."""
        account = self._accounts.get(request.tenant)
        if account is None:
            account = self._join(request.tenant)
        account.unfinished += 1
        self._latest = max(self._latest, request.arrival)
        if not self._holding:
            self._enter(request)
            return
        account.held[self._lane(request)].push(request)
        self._renew(account)
        self.release()

    def served(self, request: Pending, seconds: float) -> None:
        """Note that a chunk of a prefill was computed, which was predicted to take ``seconds``.

        If the prefill is not complete, the rest is in its queue again. Otherwise it is forgotten.
        """
        account = self._accounts[request.tenant]
        if request.charge:
            left = min(request.charge, self._price(request)) if request.new_tokens else 0.0
            account.unserved[self._lane(request)] -= request.charge - left
            request.charge = left
            if not left:
                self._charged.pop(request.id, None)
        elif self._debts and len(self._accounts) == 1:
            account.charged += seconds  # so that it catches up with those who left ahead of it
        if request.new_tokens:
            self._renew(account)
        else:
            self._part(account)

    def remove(self, request: Pending) -> None:
        """Forget a prefill that is not complete, and refund the charge for what did not run.

        A chunk that is in flight counts as run.
        """
        account = self._accounts[request.tenant]
        lane = self._lane(request)
        backlog = account.backlog[lane].get(request.entered)
        if request.held:
            account.held[lane].discard(request)
            account.raised[lane].pop(request.id, None)
            self._raise(account, lane)
        elif backlog is not None and request.flight is None:
            backlog.discard(request)
        else:
            self._queues[lane].discard(request)
            self._charged.pop(request.id, None)
            account.unserved[lane] -= request.charge
            running = 0 if request.flight is None else request.flight.tokens
            self._charge(account, -request.charge * (1 - running / request.new_tokens))
            request.charge = 0.0
        self._part(account)

    def release(self) -> None:
        """Queue the held prefills that may enter now. Call it after `served` and `remove`."""
        if not self._holding:
            return
        if len(self._accounts) <= 1:
            self._release_alone()
            return
        window = self._window()
        while self._ready and self._ready[0][0] <= self._order[0][0] + window:
            account = self._accounts[self._ready[0][1]]
            lane = account.lane(window)
            if lane is None:  # the window is smaller now
                self._renew(account)
                continue
            request = self._take(account, lane)
            self._admit(account, request)
            self._enter(request)

    def _lane(self, request: Pending) -> bool:
        return request.short and len(self._queues) > 1

    def _enter(self, request: Pending) -> None:
        request.entered = self._round
        self._queues[self._lane(request)].push(request)

    def _take(self, account: Account, lane: bool) -> Pending:
        """Take the first held prefill of a lane, and hold another one of the backlog."""
        request = account.held[lane].pop()
        account.raised[lane].pop(request.id, None)
        self._raise(account, lane)
        return request

    def _raise(self, account: Account, lane: bool) -> None:
        """Hold the first prefills of a backlog, MOST_RAISED at a time."""
        backlog = account.backlog[lane]
        while backlog and len(account.raised[lane]) < MOST_RAISED:
            entered, queue = next(reversed(backlog.items()))  # it was in front of the older ones
            request = next(queue.drain(self._latest), None)
            if request is not None:
                request.entered = RAISED
                account.raised[lane][request.id] = request
                account.held[lane].push(request)
            if not len(queue):
                del backlog[entered]

    def _join(self, tenant: str) -> Account:
        """Open the account of a tenant. From the second account on, prefills are held."""
        level = self._order[0][0] if self._order else 0.0
        if len(self._accounts) == 1:
            (alone,) = self._accounts.values()
            level = alone.charged
        account = Account(tenant, max(level, self._debts.pop(tenant, level)))
        self._accounts[tenant] = account
        if len(self._accounts) == 2:
            self._holding = True
            self._hold(alone)
            self._order = sorted((a.charged, a.tenant) for a in self._accounts.values())
        elif len(self._accounts) > 2:
            insort(self._order, (account.charged, tenant))
        return account

    def _part(self, account: Account) -> None:
        """Count off one prefill of an account, and close the account after its last."""
        account.unfinished -= 1
        if account.unfinished:
            if self._holding:
                self._renew(account)
            return
        self._renew(account, open_=False)
        del self._accounts[account.tenant]
        if not self._accounts:
            self._debts.clear()
            self._holding = False
        if not self._order:
            return
        del self._order[bisect_left(self._order, (account.charged, account.tenant))]
        level = self._order[0][0]
        if account.charged > level:
            self._debts[account.tenant] = account.charged
        if len(self._debts) > 2 * len(self._accounts) + MOST_DEBTS:
            self._debts = {name: debt for name, debt in self._debts.items() if debt > level}
        if len(self._accounts) == 1:
            self._order.clear()

    def _hold(self, account: Account) -> None:
        """Set aside what a tenant that is no longer alone has in the queues, but what it has begun.

        O(prefills with a charge or a chunk in flight), of which there are few.
        """
        before = self._round
        self._round += 1
        for lane, queue in self._queues.items():
            if len(queue):
                account.backlog[lane][before] = queue.split_off()
                self._lower(account, lane, before)
        for request in list(self._charged.values()):
            if not request.held and request.flight is None:
                account.backlog[self._lane(request)][before].discard(request)
                self._enter(request)
        for request in self._flying():
            request.entered = self._round
            if not request.charge:
                self._admit(account, request)
        for lane in self._queues:
            self._raise(account, lane)
        self._renew(account)

    def _lower(self, account: Account, lane: bool, entered: int) -> None:
        """Put prefills that are held back into a backlog, in which others go before them."""
        backlog = account.backlog[lane][entered]
        for request in account.raised[lane].values():
            account.held[lane].discard(request)
            request.entered = entered
            backlog.push(request)
        account.raised[lane].clear()

    def _release_alone(self) -> None:
        """Queue some of the prefills that the last tenant holds; after the last, stop holding."""
        for account in self._accounts.values():
            for lane in self._queues:
                for _ in range(RELEASED_AT_ONCE):
                    if not account.held[lane]:
                        break
                    self._enter(self._take(account, lane))
            self._renew(account)
            if any(account.held.values()):
                return
        self._holding = False

    def _admit(self, account: Account, request: Pending) -> None:
        """Charge a prefill that is in its queue or is about to enter it."""
        request.charge = self._price(request)
        if request.charge:
            self._charged[request.id] = request
        account.unserved[self._lane(request)] += request.charge
        self._charge(account, request.charge)

    def _charge(self, account: Account, seconds: float) -> None:
        if self._order:
            del self._order[bisect_left(self._order, (account.charged, account.tenant))]
            insort(self._order, (account.charged + seconds, account.tenant))
        account.charged += seconds
        self._renew(account)

    def _renew(self, account: Account, open_: bool = True) -> None:
        """Update the place of an account in ``_ready``."""
        if not self._holding and account.key is None:
            return
        if account.key is not None:
            del self._ready[bisect_left(self._ready, account.key)]
            account.key = None
        if open_ and account.lane(self._window()) is not None:
            account.key = (account.charged, account.tenant)
            insort(self._ready, account.key)
