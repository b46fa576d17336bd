"""Failures of simulated instances."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure of an instance.

    Raises:
        ValueError: a field is negative.
    """

    time: float
    """Seconds of virtual time."""
    instance: int
    """Number of the instance, from 0; prefill instances come first, then decode instances."""
    down_seconds: float
    """Time until the instance is started again."""

    def __post_init__(self) -> None:
        if self.time < 0 or self.instance < 0 or not self.down_seconds >= 0:
            raise ValueError(f"time, instance and down_seconds must be at least 0 in {self}")


def draw_faults(
    instances: int, mean_seconds: float, down_seconds: float, until: float, seed: int
) -> list[Fault]:
    """Draw failures: each instance fails again and again, after an exponential time of running.

    Args:
        mean_seconds: mean of that time.
        down_seconds: time from a failure to the restart.
        until: seconds after which no failure is drawn.

    Raises:
        ValueError: ``mean_seconds`` is not positive.
    """
    if not mean_seconds > 0:
        raise ValueError(f"mean_seconds must be positive, not {mean_seconds}")
    faults = []
    for instance in range(instances):
        rng = random.Random(f"{seed}/fault/{instance}")
        time = rng.expovariate(1 / mean_seconds)
        while time < until:
            faults.append(Fault(time, instance, down_seconds))
            time += down_seconds + rng.expovariate(1 / mean_seconds)
    return sorted(faults, key=lambda fault: (fault.time, fault.instance))
