"""Bounds how long a loop waits for others: a part of its time, shared between tenants."""

from __future__ import annotations

from collections.abc import Collection


class WaitBudget:
    """Seconds that may be waited, as token buckets: one for all, and one for each tenant.

    Over any stretch of t seconds at most ``burst + share * t`` seconds are granted in all. While n
    tenants have waited lately, each may use one part in n + 1 of the share, so that a tenant which
    has not waited lately finds the bucket of all filled.

    Example: with a share of 0.05 and one tenant that always wants to wait, a loop waits for it
    during 2.5% of its time. Another tenant's first wait is granted in full.

    Args:
        share: part of the time that may be waited.
        burst: seconds that may be waited at once.
    """

    def __init__(self, share: float, burst: float) -> None:
        self._share = share
        self._burst = burst
        self._left = burst
        self._tenants: dict[str, float] = {}
        """Seconds left of each tenant that has waited lately; all others have the whole burst."""
        self._now: float | None = None

    def granted(self, tenant: str, now: float) -> float:
        """Return the seconds that may be waited for a tenant now; 0 or more."""
        self._refill(now)
        return max(0.0, min(self._left, self._tenants.get(tenant, self._burst)))

    def spend(self, tenants: Collection[str], seconds: float, now: float) -> None:
        """Charge seconds that were waited for these tenants together, up to ``now``."""
        self._refill(now)
        self._left -= seconds
        for tenant in tenants:
            self._tenants[tenant] = self._tenants.get(tenant, self._burst) - seconds

    def _refill(self, now: float) -> None:
        since = 0.0 if self._now is None else max(0.0, now - self._now)
        self._now = now
        self._left = min(self._burst, self._left + self._share * since)
        more = self._share * since / (len(self._tenants) + 1)
        for tenant, left in list(self._tenants.items()):
            if left + more >= self._burst:
                del self._tenants[tenant]
            else:
                self._tenants[tenant] = left + more
