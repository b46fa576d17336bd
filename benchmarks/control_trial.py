"""A step of the mix through a real fleet of four processes; part of `fleet_control.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fleet_real import Ask, alone, play, poisson, real_fleet

STRICT = "class-pools:overflow_seconds=inf"
SHORT, LONG = (160, 256), (1024, 2048)


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
class Trial:
    """One short and three long instances; at the step most of the work becomes short.

    The objective is relative: five times what a prompt takes on the idle fleet, at least 0.4 s.
    """

    controller: str
    folder: Path
    period: float = 2.0
    step: float = 20.0
    end: float = 50.0
    short_work: tuple[float, float] = (0.2, 1.3)
    """Seconds of prefill that arrive a second, before and after, as the engines predict it within a
    batch: one short instance cannot do what comes after the step, however it batches."""
    long_work: tuple[float, float] = (0.6, 0.05)

    async def run(self) -> Outcome:
        pools = ("--short", "1", "--long", "3")
        words = ("--routing", STRICT, "--controller", self.controller)
        words = (*words, "--control-seconds", str(self.period))
        with real_fleet(pools, 4, self.folder, *words) as fleet:
            await play(fleet.url, poisson(9, 0.0, 6.0, [(10, *SHORT), (1, *LONG)]), 9)
            idle = {n: await alone(fleet.url, n) for n in (*SHORT, *LONG)}
            cost = await _cost(fleet.url)
            asks = self._asks(cost)
            began = time.monotonic()
            firsts = await play(fleet.url, asks, 1)
            moves = await _moves(fleet.url, began)
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
                "short_work": self.short_work,
                "long_work": self.long_work,
                "requests": len(asks),
                "cost_seconds": cost,
                "idle_ttft_s": {str(n): round(seconds, 4) for n, seconds in idle.items()},
            },
        )

    def _asks(self, cost: dict[str, float]) -> list[Ask]:
        found: list[Ask] = []
        for number, (start, end) in enumerate(((0.0, self.step), (self.step, self.end))):
            rates = [
                (work[number] / _mean(kind, cost), *kind)
                for work, kind in ((self.short_work, SHORT), (self.long_work, LONG))
            ]
            found += poisson(number, start, end, rates)
        return found


def _mean(kind: Sequence[int], cost: dict[str, float]) -> float:
    """Seconds of a prompt of this kind in a batch with others."""
    sizes = range(kind[0], kind[1] + 1, 16)
    each = [cost["token"] * n + cost["attention"] * n * n / 2 + cost["sequence"] for n in sizes]
    return sum(each) / len(each)


async def _cost(url: str) -> dict[str, float]:
    """Coefficients, means over the instances."""
    async with httpx.AsyncClient(trust_env=False) as client:
        content = (await client.get(f"{url}/fleet")).json()
    costs = [i["report"]["cost"] for i in content["instances"] if i["report"]["cost"]]
    return {name: sum(cost[name] for cost in costs) / len(costs) for name in costs[0]}


def _objective(ask: Ask, idle: dict[int, float]) -> float:
    kind = SHORT if ask.short else LONG
    share = (ask.tokens - kind[0]) / (kind[1] - kind[0])
    return max(0.4, 5 * (idle[kind[0]] + share * (idle[kind[1]] - idle[kind[0]])))


async def _moves(url: str, began: float) -> list[tuple[float, str]]:
    """Times after the start, and into which pool."""
    async with httpx.AsyncClient(trust_env=False) as client:
        content = (await client.get(f"{url}/fleet")).json()
    now = time.monotonic() - began
    return [(now - move["seconds_ago"], move["to"]) for move in content["moves"]]
