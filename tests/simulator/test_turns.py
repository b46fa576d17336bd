from __future__ import annotations

from itertools import pairwise

import pytest

from pla_serve.simulator.caches import SimulatedPrefixCache
from pla_serve.simulator.faults import draw_faults
from pla_serve.simulator.turns import SimulatedTurn, turns_of
from pla_serve.traces.load import load_trace
from pla_serve.traces.rows import Row
from tests.simulator.fleets import simulate


def replay(turns: list[SimulatedTurn]) -> list[int]:
    """What a cache without bounds holds of each prompt."""
    cache, held = SimulatedPrefixCache(1 << 60), []
    for turn in turns:
        held.append(min(cache.match(turn.prompt), turn.prompt_tokens - 1))
        cache.insert((*turn.prompt, *turn.answer))
    return held


@pytest.mark.parametrize("kind", ["chat", "chat+documents", "documents"])
def test_a_cache_without_bounds_holds_what_the_rows_say(kind: str) -> None:
    rows = load_trace(f"gen:{kind}:requests=2000", seed=1).rows
    turns = turns_of(rows)
    assert replay(turns) == [row.cached_tokens or 0 for row in rows]
    assert sum(map(bool, replay(turns))) == sum((row.cached_tokens or 0) > 0 for row in rows)


def row(index: int, tokens: int, cached: int = 0, **rest: object) -> Row:
    return Row(index, float(index), tokens, 10, cached_tokens=cached, **rest)  # type: ignore[arg-type]


def test_blocks_that_all_sessions_share() -> None:
    rows = [
        row(0, 100, 0, blocks=(range(3),), block_tokens=32),
        row(1, 150, 64, blocks=(range(2), range(7, 9)), block_tokens=32),
        row(2, 40, 0, blocks=(range(20, 22),), block_tokens=32),
    ]
    turns = turns_of(rows)
    assert replay(turns) == [0, 64, 0]
    assert [sum(map(len, turn.prompt)) for turn in turns] == [96, 128, 40], "a part of a block"


def test_blocks_that_are_numbered_within_each_session() -> None:
    rows = [
        row(0, 100, 0, session="a", blocks=(range(3),), block_tokens=32),
        row(1, 100, 0, session="b", blocks=(range(3),), block_tokens=32),
        row(2, 130, 96, session="a", blocks=(range(4),), block_tokens=32),
        row(3, 130, 96, session="b.1", blocks=(range(4),), block_tokens=32),
    ]
    assert replay(turns_of(rows)) == [0, 0, 96, 96]


def test_blocks_of_two_sizes_have_nothing_in_common() -> None:
    rows = [
        row(0, 64, 0, blocks=(range(2),), block_tokens=32),
        row(1, 64, 0, blocks=(range(1),), block_tokens=64),
    ]
    assert replay(turns_of(rows)) == [0, 0]


def test_a_common_prefix_of_first_turns_and_a_cut_in_a_later_one() -> None:
    rows = [
        row(0, 50, 0, session="a"),
        row(1, 70, 60, session="a"),
        row(2, 40, 30, session="b"),
        row(3, 45, 30, session="c"),
        row(4, 90, 20, session="a"),
        row(5, 45, 0),
    ]
    turns = turns_of(rows)
    assert replay(turns) == [0, 60, 0, 30, 20, 0]
    assert [turn.after for turn in turns] == [-1, 0, -1, -1, 1, -1]
    assert turns[5].prompt == ()


def test_times_are_stretched_and_thoughts_are_not() -> None:
    rows = [row(0, 5, session="a"), Row(1, 3.0, 7, 1, session="a", think=2.0)]
    assert [(turn.time, turn.think) for turn in turns_of(rows, 10.0)] == [(0.0, 0.0), (30.0, 2.0)]


def test_an_instance_keeps_the_answer_that_it_decoded() -> None:
    """50 and 10 tokens are cached where both were computed, 50 where only the prefill was."""
    turns = turns_of([row(0, 50, 0, session="a"), row(1, 70, 60, session="a")])
    for decode, instances, held in (("none", 0, 60), ("same", 0, 60), ("apart", 1, 50)):
        result = simulate(turns, cache_tokens=500, decode=decode, decode_instances=instances)
        assert result.jobs[1].history == held


def test_a_history_that_is_everywhere() -> None:
    turns = [SimulatedTurn(n, float(n), 1000, 1, (), history=900) for n in range(4)]
    for routing in ("predicted", "cache-aware", "class-pools", "least-loaded"):
        result = simulate(turns, routing=routing, instances=2, short_instances=1)
        assert [job.new_tokens for job in result.jobs] == [100] * 4


def test_faults_are_drawn_apart_and_in_order() -> None:
    faults = draw_faults(50, 100.0, 5.0, 1000.0, seed=1)
    assert faults == draw_faults(50, 100.0, 5.0, 1000.0, seed=1)
    assert faults == sorted(faults, key=lambda fault: fault.time)
    assert 350 < len(faults) < 650
    mine = [fault.time for fault in faults if fault.instance == 7]
    assert all(b - a >= 5.0 for a, b in pairwise(mine))
    fewer = [fault for fault in faults if fault.instance < 20]
    assert fewer == draw_faults(20, 100.0, 5.0, 1000.0, seed=1)
