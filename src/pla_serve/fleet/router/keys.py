"""Shares of tenants in a fleet that is over its capacity."""

from __future__ import annotations

from dataclasses import dataclass, field

IDLE_SECONDS = 5.0
"""A tenant without work for this long is no longer counted among those that share."""


@dataclass(slots=True)
class _Account:
    seconds: float = 0.0
    """Predicted prefill of the tenant's requests that have no first token yet."""
    last: float = 0.0
    requests: dict[str, float] = field(default_factory=dict)


class KeyShares:
    """Predicted seconds of waiting prefill by tenant, by which a full fleet refuses requests.

    While the fleet has room, no tenant is limited. Beyond its limit, each tenant that had work
    lately may have an equal part of the backlog, and requests beyond that part are refused. So a
    tenant that floods the fleet is refused, and one that needs less than its part is not. The
    backlog is at most the limit, and one part more for each tenant that joins.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def charge(self, tenant: str, id: str, seconds: float, now: float) -> None:
        """Add the predicted seconds of a request, in place of what it was charged before."""
        self.discharge(tenant, id, now)
        account = self._accounts.setdefault(tenant, _Account())
        account.requests[id] = seconds
        account.seconds += seconds
        account.last = now

    def discharge(self, tenant: str, id: str, now: float) -> None:
        """Take off a request that has its first token or has ended; unknown ones are ignored."""
        account = self._accounts.get(tenant)
        if account is None:
            return
        seconds = account.requests.pop(id, None)
        if seconds is not None:
            account.seconds = account.seconds - seconds if account.requests else 0.0
            account.last = now

    def entitled(self, tenant: str, seconds: float, limit: float, now: float) -> bool:
        """Whether a tenant with so many seconds more has at most its part of ``limit``."""
        self._forget(now)
        account = self._accounts.setdefault(tenant, _Account())
        account.last = now
        return account.seconds + seconds <= limit / len(self._accounts)

    def outstanding(self, tenant: str) -> float:
        """Return the seconds that a tenant is charged now."""
        account = self._accounts.get(tenant)
        return account.seconds if account else 0.0

    def _forget(self, now: float) -> None:
        idle = [
            tenant
            for tenant, account in self._accounts.items()
            if not account.requests and now - account.last > IDLE_SECONDS
        ]
        for tenant in idle:
            del self._accounts[tenant]
