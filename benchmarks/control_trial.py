"""A step of the mix through a real fleet of four processes; part of `fleet_control.py`."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
from fleet_real import LARGER, Ask, alone, play, poisson, real_fleet

STRICT = "class-pools:overflow_seconds=inf"
SHORT, LONG = (160, 256), (1024, 2048)
POOLS = ("--short", "1", "--long", "3")
BURST = 32
"""Short prompts at once, by which the capacity of one instance is measured."""
NO_BATCHES = ("--max-batch-requests", "1")
"""A long queue would make large batches, in which one instance does as many of these small prompts
as two cores do one by one: it could not be overloaded without overloading the machine."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `fleet_control.judge` needs, and what else is to be told."""

    times: list[float]
    late: list[bool]
    moves: list[tuple[float, str]]
    step: float
    end: float
    period: float
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Costs:
    """Of prompts on a fleet that nobody else uses, in seconds."""

    idle: dict[int, float]
    """To the first token of a single prompt, by its tokens."""
    short_one_by_one: float
    """What the one short instance takes for each prompt of a queue."""

    @classmethod
    async def measure(cls, folder: Path) -> Costs:
        """On a fleet of its own, without a controller: it would take the queues for load."""
        words = ("--routing", STRICT, "--controller", "off", *NO_BATCHES)
        with real_fleet(POOLS, 4, folder, *words, model=LARGER) as fleet:
            await _warm_up(fleet.url)
            idle = {n: await alone(fleet.url, n) for n in (*SHORT, *LONG)}
            return cls(idle, await _one_by_one(fleet.url))


@dataclass(frozen=True, slots=True)
class Trial:
    """One short and three long instances; at the step most of the work becomes short.

    Loads are shares of what one instance does alone, one prompt after another. After the step more
    short work comes than one instance can do, and less in all than two cores can, which client and
    router share with the instances.

    The objective is relative: five times what a prompt takes on the idle fleet, at least 0.4 s.
    """

    controller: str
    costs: Costs
    folder: Path
    period: float = 2.0
    step: float = 20.0
    end: float = 50.0
    short_load: tuple[float, float] = (0.25, 1.1)
    """Before the step, and after it."""
    long_load: tuple[float, float] = (0.5, 0.05)

    async def run(self) -> Outcome:
        idle, each = self.costs.idle, self.costs.short_one_by_one
        words = ("--routing", STRICT, "--controller", self.controller)
        words = (*words, "--control-seconds", str(self.period), *NO_BATCHES)
        with real_fleet(POOLS, 4, self.folder, *words, model=LARGER) as fleet:
            await _warm_up(fleet.url)
            asks = self._asks(each, sum(idle[n] for n in LONG) / 2)
            began = time.monotonic()
            watch = asyncio.create_task(_watch(fleet.url, began, self.period / 2))
            firsts = await play(fleet.url, asks, 1)
            moves = await _moves(fleet.url, began)
            watch.cancel()
            seen = await watch
        objective = [_objective(ask, idle) for ask in asks]
        return Outcome(
            [ask.due for ask in asks],
            [first > due for first, due in zip(firsts, objective, strict=True)],
            [move for move in moves if move[0] >= 0],
            self.step,
            self.end,
            self.period,
            {
                "instances": 4,
                "controller": self.controller,
                "routing": STRICT,
                "period_s": self.period,
                "short_load": self.short_load,
                "long_load": self.long_load,
                "requests": len(asks),
                "idle_ttft_s": {str(n): round(seconds, 4) for n, seconds in idle.items()},
                "short_one_by_one_s": round(each, 5),
                "longest_ttft_s": round(max(firsts), 2),
                "seen": seen,
            },
        )

    def _asks(self, short: float, long: float) -> list[Ask]:
        """Given the seconds that one prompt of each kind takes."""
        found: list[Ask] = []
        for number, (start, end) in enumerate(((0.0, self.step), (self.step, self.end))):
            rates = [
                (self.short_load[number] / short, *SHORT),
                (self.long_load[number] / long, *LONG),
            ]
            found += poisson(number, start, end, rates)
        return found


async def _warm_up(url: str) -> None:
    await play(url, poisson(9, 0.0, 6.0, [(3, *SHORT), (0.5, *LONG)]), 9)


async def _one_by_one(url: str) -> float:
    """Seconds that the one short instance takes for each prompt of a queue; median of three."""
    found = []
    for number in range(3):
        random = Random(number)
        burst = [Ask(0.0, random.randint(*SHORT)) for _ in range(BURST)]
        found.append(max(await play(url, burst, f"burst/{number}")) / BURST)
    return sorted(found)[1]


def _objective(ask: Ask, idle: dict[int, float]) -> float:
    kind = SHORT if ask.short else LONG
    share = (ask.tokens - kind[0]) / (kind[1] - kind[0])
    return max(0.4, 5 * (idle[kind[0]] + share * (idle[kind[1]] - idle[kind[0]])))


async def _watch(url: str, began: float, seconds: float) -> list[dict[str, Any]]:
    """Pools and demands, as the router itself tells them, until it is cancelled."""
    seen: list[dict[str, Any]] = []
    async with httpx.AsyncClient(trust_env=False) as client:
        with suppress(asyncio.CancelledError):
            while True:
                content = (await client.get(f"{url}/fleet")).json()
                demands = content["desired"]["demands"] if content["desired"] else {}
                row: dict[str, Any] = {"s": round(time.monotonic() - began, 1)}
                row["pools"] = content["pools"]
                for name, demand in demands.items():
                    row[name] = [round(value, 2) for value in demand.values()]
                seen.append(row)
                await asyncio.sleep(seconds)
    return seen


async def _moves(url: str, began: float) -> list[tuple[float, str]]:
    """Times after the start, and into which pool."""
    async with httpx.AsyncClient(trust_env=False) as client:
        content = (await client.get(f"{url}/fleet")).json()
    now = time.monotonic() - began
    return [(now - move["seconds_ago"], move["to"]) for move in content["moves"]]
