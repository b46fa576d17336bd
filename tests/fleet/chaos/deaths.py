"""Whether a request that was given up was so by design: two instances were killed under it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.fleet.chaos.load import GivenUp

NOTICED_SECONDS = 2.5
"""A killed instance may be sent requests for so long: until the router knows."""


@dataclass(frozen=True, slots=True)
class Death:
    """An instance that was killed, or whose engine was."""

    port: int
    at: float


def unexplained(given_up: Sequence[GivenUp], deaths: Sequence[Death], log: str) -> list[str]:
    """Return a problem for each request that was given up although no two were killed under it.

    Args:
        log: the whole log of the fleet, in which the router names the instances that were lost.
    """
    return [
        f"given up with {len(found)} deaths under it: {one}"
        for one in given_up
        if len(found := _deaths_under(one, deaths, log)) < 2
    ]


def _deaths_under(one: GivenUp, deaths: Sequence[Death], log: str) -> list[Death]:
    """The deaths, while the request ran, of instances that it was lost with."""
    lines = re.findall(rf"failed: given up, because .*\(request {re.escape(one.id)}\)", log)
    ports = {int(port) for line in lines for port in re.findall(r":(\d+) was lost", line)}
    return [
        death
        for death in deaths
        if death.port in ports and one.began - NOTICED_SECONDS <= death.at <= one.ended
    ]
