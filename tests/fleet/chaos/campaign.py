"""One fleet, one load, one list of faults, and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.fleet.chaos.deaths import unexplained
from tests.fleet.chaos.faults import Fault, Injector, draw
from tests.fleet.chaos.leaks import count_descriptors, find_leaks
from tests.fleet.chaos.load import Load, Question, Tally, learn, make_questions
from tests.fleet.chaos.tiny_fleet import TinyFleet, start_alone, start_fleet, write_model

QUESTIONS = 24


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done."""

    seed: int
    faults: int
    pools: tuple[str, ...] = ("--short", "2", "--long", "1", "--decode", "1")
    instances: int = 4
    decodes: bool = True
    clients: int = 4
    pause: float = 0.5
    """Mean seconds between faults, beside what recovery takes."""
    kv_gib: float = 0.0025
    """Of one instance: little, so that a burst fills it."""
    seconds: float = 3600.0
    """No further fault after so long."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it."""

    tally: Tally
    done: list[tuple[float, Fault]]
    leaks: list[str]
    seconds: float
    recovered: list[float]
    """Seconds until the fleet was whole again after each fault."""
    log: str

    @property
    def kinds(self) -> Counter[str]:
        return Counter(fault.kind.value for _, fault in self.done)


def run(plan: Plan, folder: Path, *words: str) -> Result:
    """Start everything, break it, and look what is left. ``words``: further flags."""
    model = write_model(folder / "model")
    questions = make_questions(plan.seed, QUESTIONS)
    with start_alone(model) as url:
        questions = asyncio.run(learn(url, questions))
    flags = ("--kv-cache-gib", str(plan.kv_gib), *words)
    log = folder / "fleet.log"
    with start_fleet(model, plan.pools, log, *flags, count=plan.instances) as fleet:
        return asyncio.run(_break(plan, fleet, questions))


async def _break(plan: Plan, fleet: TinyFleet, questions: list[Question]) -> Result:
    # Everything that is opened once is open before descriptors are counted.
    tally = Tally()
    warm = Load(fleet.url, questions, plan.clients, plan.seed, lambda since: False, tally=tally)
    warm.start()
    await asyncio.sleep(3)
    await warm.stop()
    before = await asyncio.to_thread(count_descriptors, fleet)
    began = time.monotonic()
    tally.answered = tally.tokens = 0
    tally.first_seconds.clear()
    injector = Injector(fleet, plan.instances, questions, tally, time.monotonic)
    load = Load(fleet.url, questions, plan.clients, plan.seed + 1, injector.excused, tally=tally)
    load.start()
    faults = draw(plan.seed, plan.faults, decodes=plan.decodes, pause=plan.pause)
    await injector.run(faults, until=began + plan.seconds)
    await load.stop()
    tally.problems += unexplained(tally.given_up, injector.deaths, fleet.log())
    leaks = await asyncio.to_thread(find_leaks, fleet, before, plan.instances)
    return Result(
        tally,
        injector.done,
        leaks,
        time.monotonic() - began,
        injector.recovered,
        fleet.log(400),
    )
