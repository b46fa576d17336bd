"""Desired number of instances: a signal for an autoscaler."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, isfinite

from pla_serve.policy.pools.balance import ClassDemand


@dataclass(frozen=True, slots=True)
class ScalingOptions:
    """Raises:
    ValueError: a field is out of range.
    """

    horizon_seconds: float = 30.0
    """A backlog should be cleared in this time. Near the time that an instance takes to start:
    whatever is over sooner is over before a new one is there."""
    target_utilisation: float = 0.8
    """Share of the time that instances should compute under steady arrivals, 0 to 1."""
    calm_seconds: float = 300.0
    """The signal falls only to the highest value of this last while."""
    min_instances: int = 1
    max_instances: int = 1_000_000

    def __post_init__(self) -> None:
        if not (isfinite(self.horizon_seconds) and self.horizon_seconds > 0):
            raise ValueError(f"horizon_seconds must be positive, not {self.horizon_seconds}")
        if not 0 < self.target_utilisation <= 1:
            raise ValueError(
                f"target_utilisation must be above 0 and at most 1, not {self.target_utilisation}"
            )
        if not (isfinite(self.calm_seconds) and self.calm_seconds >= 0):
            raise ValueError(f"calm_seconds must be at least 0, not {self.calm_seconds}")
        if not 1 <= self.min_instances <= self.max_instances:
            raise ValueError(
                "min_instances must be at least 1 and at most max_instances, not "
                f"{self.min_instances} of {self.max_instances}"
            )


class Scaler:
    """Number of instances to ask for: it rises at once, and falls only after a calm time.

    A class with arrivals r and backlog q wants ``max(r / target_utilisation, r + q / horizon)``
    instances: room for chance under steady arrivals, or enough to clear what has piled up.
    """

    def __init__(self, options: ScalingOptions | None = None) -> None:
        self._options = options or ScalingOptions()
        self._recent: deque[tuple[float, int]] = deque()
        """Times and values that may still be the highest of the calm while; falling values."""

    def desired(self, now: float, demands: Iterable[ClassDemand]) -> int:
        """Desired number of instances for these classes together."""
        options = self._options
        wanted = sum(
            max(d.rate / options.target_utilisation, d.instances(options.horizon_seconds))
            for d in demands
        )
        # A hair of rounding error must not start a machine.
        now_wanted = min(max(ceil(wanted - 1e-9), options.min_instances), options.max_instances)
        while self._recent and self._recent[-1][1] <= now_wanted:
            self._recent.pop()
        self._recent.append((now, now_wanted))
        while self._recent[0][0] < now - options.calm_seconds:
            self._recent.popleft()
        return self._recent[0][1]
