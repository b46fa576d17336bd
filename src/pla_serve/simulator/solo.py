"""One instance serves a workload: the shortest way through virtual time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.request import SimulatedRequest


def serve(
    instance: SimulatedInstance,
    jobs: Sequence[SimulatedRequest],
    progress: Callable[[int], None] | None = None,
) -> float:
    """Run all jobs, which are sorted by arrival, to their end; returns the time of the end.

    Jobs that the instance refuses are marked, and do not come again.

    Args:
        progress: called every thousand arrivals with their number.
    """
    now = 0.0
    for count, job in enumerate(jobs):
        arrival = job.arrival
        while instance.wake_at < arrival:
            now = instance.wake_at
            instance.advance(now)
        now = max(now, arrival)
        job.refused = instance.submit(job, now) is not None
        if progress is not None and count % 1000 == 0:
            progress(count)
    while instance.jobs:
        now = instance.wake_at
        instance.advance(now)
    return now
