"""When instances fail."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """Raises:
    ValueError: a field is negative.
    """

    time: float
    """Seconds of virtual time."""
    instance: int
    """By number, from 0; prefill instances first, then decode instances."""
    down_seconds: float
    """Until it is being started again."""

    def __post_init__(self) -> None:
        if self.time < 0 or self.instance < 0 or not self.down_seconds >= 0:
            raise ValueError(f"time, instance and down_seconds must be at least 0 in {self}")


def draw_faults(
    instances: int, mean_seconds: float, down_seconds: float, until: float, seed: int
) -> list[Fault]:
    """Each instance fails after an exponential time of ``mean_seconds`` up, again and again.

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
