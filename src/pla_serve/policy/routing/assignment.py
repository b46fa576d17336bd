"""Decides which of several instances takes over which running request: an assignment problem.

The idea is SpotServe's (arXiv 2311.15566), which matches what moves with the KV that is there
already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

NEVER = 1e9
"""What is not possible costs so many seconds, more than any sum of possible costs."""


@dataclass(frozen=True, slots=True)
class Mover:
    """A running request that has to leave its instance."""

    tokens: int
    """Its KV has so many; at least 1."""
    cached: Mapping[str, int]
    """Instances hold so many of these already, by instance."""


@dataclass(frozen=True, slots=True)
class Host:
    """An instance that can take requests over."""

    name: str
    room: int
    """It has memory for the KV of so many tokens."""
    wait: float
    """Work of so many seconds is queued there."""


def assign(
    movers: Sequence[Mover],
    hosts: Sequence[Host],
    transfer_seconds: Callable[[int], float],
    crowd_seconds: float,
) -> list[str | None]:
    """Return a host for each mover, or None where there is no room for it.

    The sum of costs is least, by `scipy.optimize.linear_sum_assignment`. A mover costs the seconds
    that its missing KV takes to get there, the wait there, and ``crowd_seconds`` for each mover
    that the host gets before it, so that they spread. Every mover that fits somewhere gets a place
    unless others take the room; where it is short, those that cost least go first.
    """
    found: list[str | None] = [None] * len(movers)
    room = {host.name: host.room for host in hosts}
    taken = {host.name: 0 for host in hosts}
    left = list(range(len(movers)))
    while left:
        placed = _round(movers, hosts, left, room, taken, transfer_seconds, crowd_seconds)
        for index, name in placed:
            found[index] = name
            room[name] -= movers[index].tokens
            taken[name] += 1
            left.remove(index)
        if not placed:
            break
    return found


def _round(
    movers: Sequence[Mover],
    hosts: Sequence[Host],
    left: Sequence[int],
    room: Mapping[str, int],
    taken: Mapping[str, int],
    transfer_seconds: Callable[[int], float],
    crowd_seconds: float,
) -> list[tuple[int, str]]:
    """Solve for the movers that are left, and return those that fit together, cheapest first.

    A host is as many columns as it may get movers, each dearer than the one before it.
    """
    least = min(movers[index].tokens for index in left)
    columns = [
        (host, turn)
        for host in hosts
        for turn in range(min(len(left), max(0, room[host.name]) // least))
    ]
    if not columns:
        return []
    costs = np.full((len(left), len(columns)), NEVER)
    for row, index in enumerate(left):
        mover = movers[index]
        for column, (host, turn) in enumerate(columns):
            if mover.tokens <= room[host.name]:
                missing = max(0, mover.tokens - mover.cached.get(host.name, 0))
                crowd = (taken[host.name] + turn) * crowd_seconds
                costs[row, column] = transfer_seconds(missing) + host.wait + crowd
    rows, chosen = linear_sum_assignment(costs)
    pairs = sorted(zip(rows, chosen, strict=True), key=lambda pair: float(costs[pair]))
    open_room, fitting = dict(room), []
    for row, column in pairs:
        index, name = left[row], columns[column][0].name
        if costs[row, column] < NEVER and movers[index].tokens <= open_room[name]:
            open_room[name] -= movers[index].tokens
            fitting.append((index, name))
    return fitting
