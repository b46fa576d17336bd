"""Shares of tenants in a fleet that is over its capacity."""

from __future__ import annotations

from dataclasses import dataclass, field

IDLE_SECONDS = 5.0
"""A key without work for so long has no share."""


@dataclass(slots=True)
class _Account:
    seconds: float = 0.0
    """Predicted prefill of what it has sent and what has no first token yet."""
    last: float = 0.0
    requests: dict[str, float] = field(default_factory=dict)


class KeyShares:
    """Predicted seconds of waiting work by tenant.

    While there is room nobody is counted out. When there is none, each tenant that was seen
    lately is entitled to an equal part of the backlog that the fleet may have, and what goes beyond
    is refused. So the one who floods is refused, and one who asks for less than its part is not.
    The backlog stays bounded: by its limit, and one part more for each tenant that joins.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def charge(self, tenant: str, id: str, seconds: float, now: float) -> None:
        """Work of a request is on its way; a second charge takes the place of the first."""
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
        """Whether so many seconds more are within its part of ``limit``, for all tenants."""
        self._forget(now)
        account = self._accounts.setdefault(tenant, _Account())
        account.last = now
        return account.seconds + seconds <= limit / len(self._accounts)

    def outstanding(self, tenant: str) -> float:
        """Seconds."""
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
