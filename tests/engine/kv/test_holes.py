"""Holes against a plain list of free blocks, and what a full, scattered pool costs."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.engine.kv.blocks import BlockPool, extend_runs
from pla_serve.engine.kv.holes import Holes
from pla_serve.engine.kv.manager import BlockTable


def holes_of(free: set[int]) -> dict[int, int]:
    runs: list[tuple[int, int]] = []
    extend_runs(runs, sorted(free))
    return {start: end - start for start, end in runs}


@given(seed=st.integers(0, 2**32), count=st.integers(1, 300))
def test_holes_are_the_free_blocks(seed: int, count: int) -> None:
    rng = Random(seed)
    holes, free = Holes(count), set(range(count))
    for _ in range(120):
        plain = holes_of(free)
        if free and rng.random() < 0.5:
            start = rng.choice(sorted(plain))
            lead = rng.randrange(plain[start])
            taken = rng.randint(1, plain[start] - lead)
            holes.take(start + lead, taken)
            free -= set(range(start + lead, start + lead + taken))
        elif len(free) < count:
            block = rng.choice(sorted(set(range(count)) - free))
            holes.give(block)
            free.add(block)
        plain = holes_of(free)
        assert holes.total == len(free)
        assert all(holes.length(block) == plain.get(block, 0) for block in range(count))
        wanted = rng.randint(1, count + 1)
        found = holes.find(wanted)
        if found is not None:
            assert plain[found] >= wanted
        else:
            # Only a hole of nearly this length may be missed: one of the same class.
            assert all(length < 1.125 * wanted + 1 for length in plain.values())
            assert wanted >= 32 or all(length < wanted for length in plain.values())
        if free:
            assert plain[holes.longest()] * 1.125 + 1 > max(plain.values())


@given(seed=st.integers(0, 2**32))
def test_a_pool_gives_free_blocks_only_and_all_of_them(seed: int) -> None:
    rng = Random(seed)
    pool = BlockPool(rng.randint(1, 200))
    live: list[list[int]] = []
    for _ in range(100):
        held = {block for blocks in live for block in blocks}
        assert pool.free == pool.count - len(held)
        if rng.random() < 0.55:
            count = rng.randint(0, min(pool.free, 40))
            after = rng.choice(live)[-1] if live and rng.random() < 0.5 else None
            chosen = pool.allocate(count, after=after, room=rng.choice((0, 2, 16)))
            assert len(set(chosen)) == count
            assert not held & set(chosen)
            if after is not None and count and after + 1 < pool.count and after + 1 not in held:
                assert chosen[0] == after + 1, "it grows in place where it can"
            if chosen:
                live.append(chosen)
        elif live:
            pool.release(live.pop(rng.randrange(len(live))))
    with pytest.raises(ValueError, match="blocks wanted"):
        pool.allocate(pool.free + 1)
    assert len(pool.allocate(pool.free)) + sum(map(len, live)) == pool.count


def test_a_run_leaves_room_for_itself_and_its_neighbour() -> None:
    pool = BlockPool(100)
    first = pool.allocate(4, room=16)
    second = pool.allocate(4, room=16)
    assert first == [0, 1, 2, 3]
    assert second == [20, 21, 22, 23]
    assert pool.allocate(3, after=3, room=16) == [4, 5, 6]


def test_time_does_not_grow_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the holes that are looked at, in a pool whose free blocks all stand alone."""
    looked: list[int] = []
    plain = Holes._is_in
    monkeypatch.setattr(
        Holes,
        "_is_in",
        lambda self, start, index: looked.append(start) or plain(self, start, index),
    )
    pool = BlockPool(40_000)
    pool.allocate(40_000)
    pool.release(range(0, 40_000, 2))
    looked.clear()
    for _ in range(100):
        pool.release(pool.allocate(3, room=16))
    assert len(looked) < 100 * 50


@given(seed=st.integers(0, 2**32))
def test_the_numbers_of_a_table_are_its_blocks(seed: int) -> None:
    rng = Random(seed)
    table = BlockTable()
    for _ in range(60):
        if rng.random() < 0.1 and table.blocks:
            table.blocks[rng.randrange(len(table.blocks))] = rng.randrange(1000)
            table.forget_layout()
        table.blocks += [rng.randrange(1000) for _ in range(rng.randint(0, 9))]
        if rng.random() < 0.7:
            numbers = table.numbers()
            assert numbers.dtype == np.int32
            assert numbers.tolist() == table.blocks
            assert [b for first, end in table.runs() for b in range(first, end)] == table.blocks
