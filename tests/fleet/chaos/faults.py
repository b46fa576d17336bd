"""What is done to a fleet, in an order that follows from a seed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from random import Random

import httpx

from tests.fleet.chaos.deaths import Death
from tests.fleet.chaos.load import Question, Tally, ask
from tests.fleet.chaos.tiny_fleet import Process, TinyFleet, is_ready


class Kind(StrEnum):
    KILL_INSTANCE = "kill -9 of an instance"
    KILL_ENGINE = "kill -9 of an engine"
    HANG_INSTANCE = "SIGSTOP of an instance"
    HANG_ENGINE = "SIGSTOP of an engine"
    FULL_KV = "full KV cache"
    CUT = "kill -9 between prefill and decode"
    KILL_ROUTER = "kill -9 of the router"
    RESTART_ROUTER = "SIGTERM of the router"


WEIGHTS = {
    Kind.KILL_INSTANCE: 12,
    Kind.KILL_ENGINE: 18,
    Kind.HANG_INSTANCE: 21,
    Kind.HANG_ENGINE: 20,
    Kind.FULL_KV: 13,
    Kind.CUT: 10,
    Kind.KILL_ROUTER: 3,
    Kind.RESTART_ROUTER: 3,
}
"""Of a hundred: those that cost a start of a process are the dearer ones."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that will be done."""

    kind: Kind
    victim: int
    """Which of those that it may hit, modulo their number."""
    seconds: float
    """Length of a hang; of a cut, how long after the prompt was sent."""
    pause: float
    """Until the next fault."""


def draw(seed: int, count: int, *, decodes: bool, pause: float) -> list[Fault]:
    """The same list for the same arguments. Every kind occurs if there is room for all."""
    random = Random(seed)
    kinds = [kind for kind in Kind if decodes or kind is not Kind.CUT]
    drawn = random.choices(kinds, [WEIGHTS[kind] for kind in kinds], k=count)
    drawn[: len(kinds)] = kinds[:count]
    random.shuffle(drawn)
    return [
        Fault(
            kind,
            random.randrange(1000),
            random.uniform(0.0, 0.3) if kind is Kind.CUT else random.uniform(0.2, 5.0),
            random.uniform(0.3, 1.7) * pause,
        )
        for kind in drawn
    ]


class Injector:
    """Does it. A fault waits until all but one of the instances are there again, and the router.
    Hangs go on meanwhile.

    Args:
        clock: monotonic seconds, the same as the load's.
    """

    def __init__(
        self,
        fleet: TinyFleet,
        count: int,
        questions: Sequence[Question],
        tally: Tally,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._count = count
        self._longs = [q for q in questions if len(q.prompt) > 300]
        self._tally = tally
        self._clock = clock
        self._router_down: list[list[float]] = []
        """Since when, and until when."""
        self._hangs: set[asyncio.Task[None]] = set()
        self._stopped: set[int] = set()
        """Processes that stand still."""
        self.deaths: list[Death] = []
        self.done: list[tuple[float, Fault]] = []
        self.recovered: list[float] = []

    def excused(self, since: float) -> bool:
        """The router was not there all the time since then."""
        return any(end >= since for _, end in self._router_down)

    async def run(self, faults: Sequence[Fault], until: float) -> None:
        """Stops early at ``until`` on the clock."""
        for fault in faults:
            if self._clock() > until:
                break
            self.done.append((self._clock(), fault))
            await self._inject(fault)
            injected = self._clock()
            await asyncio.sleep(fault.pause)
            await self.settle(missing=1)
            self.recovered.append(self._clock() - injected)
        await asyncio.gather(*self._hangs)
        await self.settle()

    async def settle(self, missing: int = 0, seconds: float = 240.0) -> None:
        """Everybody lives and is ready but so many, or hangs because we made it."""
        async with asyncio.timeout(seconds):
            while not await asyncio.to_thread(self._whole, missing):
                await asyncio.sleep(0.1)

    def _whole(self, missing: int) -> bool:
        processes = self._fleet.processes()
        there = sum(self._is_there(process) for process in processes if process.role != "router")
        router = any(process.role == "router" and is_ready(process.url) for process in processes)
        return router and there >= self._count - missing

    def _is_there(self, process: Process) -> bool:
        if self._stopped & set(process.pids):
            return True
        return process.engine is not None and is_ready(process.url)

    async def _inject(self, fault: Fault) -> None:
        fleet, kind = self._fleet, fault.kind
        if kind in (Kind.KILL_ROUTER, Kind.RESTART_ROUTER):
            router = fleet.router()
            assert router is not None
            down = [self._clock(), inf]
            self._router_down.append(down)
            os.kill(router.pid, signal.SIGKILL if kind is Kind.KILL_ROUTER else signal.SIGTERM)
            await self._gone(router)
            await self.settle()
            down[1] = self._clock()
            return
        if kind is Kind.FULL_KV:
            await self._flood()
            return
        instances = [process for process in fleet.instances() if process.engine is not None]
        if kind is Kind.CUT:
            instances = [p for p in instances if p.role in ("decode", "long")] or instances
            await self._cut(instances[fault.victim % len(instances)], fault.seconds)
            return
        victim = instances[fault.victim % len(instances)]
        assert victim.engine is not None
        if kind is Kind.KILL_INSTANCE:
            self._kill(victim, victim.pid)
            await self._gone(victim)
        elif kind is Kind.KILL_ENGINE:
            self._kill(victim, victim.engine)
        else:
            pids = [victim.engine] if kind is Kind.HANG_ENGINE else victim.pids
            self._hang(pids, fault.seconds)

    def _hang(self, pids: Sequence[int], seconds: float) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        self._stopped |= set(pids)

        async def wake() -> None:
            await asyncio.sleep(seconds)
            self._stopped.difference_update(pids)
            for pid in pids:
                with suppress(ProcessLookupError):  # it was killed meanwhile
                    os.kill(pid, signal.SIGCONT)

        task = asyncio.create_task(wake())
        self._hangs.add(task)
        task.add_done_callback(self._hangs.discard)

    async def _flood(self) -> None:
        """More long prompts at once than all KV memory holds."""
        async with httpx.AsyncClient(
            base_url=self._fleet.url, timeout=120, trust_env=False
        ) as client:
            await asyncio.gather(
                *(ask(client, q, self._tally, self.excused, self._clock) for q in 3 * self._longs)
            )

    async def _cut(self, victim: Process, after: float) -> None:
        """The victim dies while a long prompt is on its way through it, or to it."""
        async with httpx.AsyncClient(
            base_url=self._fleet.url, timeout=120, trust_env=False
        ) as client:
            asking = asyncio.create_task(
                ask(client, self._longs[0], self._tally, self.excused, self._clock)
            )
            await asyncio.sleep(after)
            if victim.engine is not None:
                self._kill(victim, victim.engine)
            await asking

    def _kill(self, victim: Process, pid: int) -> None:
        """Kill an instance or its engine."""
        self.deaths.append(Death(victim.port, self._clock()))
        os.kill(pid, signal.SIGKILL)

    async def _gone(self, process: Process) -> None:
        async with asyncio.timeout(60):
            while any(p.pid == process.pid for p in self._fleet.processes()):
                await asyncio.sleep(0.02)
