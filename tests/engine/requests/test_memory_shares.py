"""KV blocks are shared between tenants while they contend, and lent while they do not."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.memory import CLAIM_SECONDS, PATIENCE_SECONDS, MemoryGate
from pla_serve.engine.requests.sequence import Sequence
from tests.engine.requests.test_memory import BLOCK, sequence

BLOCKS = 100
STEP = 0.05


class World:
    """A gate, a clock, and tenants whose sequences hold their blocks until they are finished."""

    def __init__(self) -> None:
        self.kv = KVManager(BLOCKS, BLOCK)
        self.gate = MemoryGate(self.kv, short_reserve=0)
        self.now = 0.0
        self.running: dict[str, Sequence] = {}
        self.parked: dict[str, float] = {}
        """When each parked sequence was parked."""
        self.preempted = 0
        self._number = 0

    def arrive(self, tenant: str, blocks: int) -> Sequence:
        self._number += 1
        self.now += 1e-4
        one = sequence(f"{tenant}{self._number}", blocks, self.now, tenant=tenant)
        self.ask(one)
        return one

    def ask(self, one: Sequence) -> None:
        if self.gate.reserve(one, one.short, len(one.tokens), self.now):
            self.running[one.id] = one
        else:
            self.parked[one.id] = self.now

    def step(self) -> None:
        """Let time pass, and do what the loop does at a layer boundary."""
        self.now += STEP
        self._resume()
        victims = self.gate.overdrawn(self.now)
        for victim in victims:
            assert not victim.in_flight
            self.gate.release(victim)
            del self.running[victim.id]
            self.preempted += 1
        if victims:
            self._resume()
        for victim in victims:
            self.ask(victim)

    def finish(self, one: Sequence) -> None:
        self.gate.release(one)
        self.running.pop(one.id, None)
        self.parked.pop(one.id, None)

    def used(self, tenant: str) -> int:
        return sum(
            len(one.table.blocks) for one in self.running.values() if one.request.tenant == tenant
        )

    def _resume(self) -> None:
        for one in self.gate.unpark(self.now):
            self.running[one.id] = one
            del self.parked[one.id]


def test_unused_memory_is_lent_and_comes_back() -> None:
    world = World()
    longs = [world.arrive("a", 20) for _ in range(7)]
    assert world.used("a") == BLOCKS, "alone, a tenant may have all"
    short = world.arrive("b", 4)
    assert short.id in world.parked
    world.step()
    assert short.id in world.running, "at the next layer boundary"
    assert world.preempted == 1
    assert longs[4].id in world.parked, "the least entitled of those with blocks"
    world.finish(short)
    for _ in range(3):
        world.step()
    assert world.used("a") == 80, "what was claimed is kept for the next request"
    for _ in range(5):
        again = world.arrive("b", 4)
        assert again.id in world.running
        world.step()
        world.finish(again)
    assert world.preempted == 1
    for _ in range(int(PATIENCE_SECONDS / STEP) + 2):
        world.step()
    assert world.used("a") == BLOCKS, "and lent again if none comes"


def test_what_is_in_flight_is_waited_for() -> None:
    world = World()
    longs = [world.arrive("a", 50) for _ in range(2)]
    for one in longs:
        one.in_flight = 1
    short = world.arrive("b", 4)
    world.step()
    assert short.id in world.parked
    longs[0].in_flight = 0
    world.step()
    assert short.id in world.running


def test_parked_floods_hold_back_nobody_else() -> None:
    """However long they have been parked, in either class."""
    world = World()
    for size in (20, 2):
        for _ in range(60):
            world.arrive("a", size)
    for _ in range(int(2 * PATIENCE_SECONDS / STEP)):
        world.step()
    for size in (2, 30):
        one = world.arrive("b", size)
        for _ in range(3):
            world.step()
        assert one.id in world.running


def test_a_tenant_alone_is_served_as_ever() -> None:
    """One tenant by any name parks, waits and is preempted alike: no share is its own."""
    world = World()
    longs = [world.arrive("a", 30) for _ in range(5)]
    for _ in range(10):
        world.step()
    assert world.preempted == 0
    world.finish(longs[0])
    world.step()
    assert longs[3].id in world.running


@pytest.mark.parametrize("growing", ["a", "b"])
def test_growth_takes_blocks_of_the_tenant_that_has_most(growing: str) -> None:
    world = World()
    mine = world.arrive("b", 40)
    longs = [world.arrive("a", 20) for _ in range(3)]
    sequence = {"a": longs[2], "b": mine}[growing]
    victim = world.gate.victim(sequence)
    if growing == "b":
        assert victim is longs[2], "although it came later"
    else:
        assert victim is None, "the last of its own tenant gives way itself"
    assert world.gate.victim(longs[0]) is longs[2]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_tenant_within_its_share_waits_for_a_bounded_thing(seed: int) -> None:
    """One sends a request at a time, within its share; the others flood, and never finish."""
    world, rng = World(), Random(seed)
    hostile = rng.choice((["a"], ["a", "c"]))
    share = BLOCKS // (len(hostile) + 1)
    most = rng.randint(1, share)
    flights: dict[str, float] = {}
    waits: list[float] = []
    mine: Sequence | None = None
    asked = done = 0.0
    for _ in range(900):
        if rng.random() < 0.5:
            world.arrive(rng.choice(hostile), rng.randint(1, 60))
        for one in list(world.running.values()):  # batches of at most half a second
            if flights.get(one.id, 0.0) <= world.now:
                one.in_flight = int(one is not mine and rng.random() < 0.3)
                flights[one.id] = world.now + 0.5 * rng.random()
        if mine is None:
            mine, asked, done = world.arrive("b", rng.randint(1, most)), world.now, 0.0
        elif mine.id in world.running and not done:
            waits.append(world.now - asked)
            done = world.now + rng.random()
        elif done and world.now >= done:
            world.finish(mine)
            mine = None
        world.step()
    if mine is not None and not done:
        waits.append(world.now - asked)
    protection = 2 * PATIENCE_SECONDS
    assert max(waits) <= protection + 0.5 + 2 * CLAIM_SECONDS + 2 * STEP
    assert sorted(waits)[len(waits) // 2] <= 0.5 + 4 * STEP
