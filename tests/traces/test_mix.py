from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.traces.cached import recount_cached
from pla_serve.traces.mix import Part, mix
from pla_serve.traces.rows import Row, TraceError


def singles(count: int, tokens: int) -> list[Row]:
    return [Row(i, float(i), tokens, 1) for i in range(count)]


def test_one_long_in_ten() -> None:
    parts = [Part("s", singles(1000, 5), 0.9), Part("l", singles(400, 5000), 0.1)]
    rows = mix(parts, seed=1)
    assert Counter(row.input_tokens for row in rows) == {5: 1000, 5000: 111}
    assert [row.index for row in rows] == list(range(1111))
    assert all(row.arrival is None for row in rows)
    assert sum(row.input_tokens == 5000 for row in rows[:555]) == pytest.approx(55, abs=20)
    assert rows == mix(parts, seed=1)
    assert rows != mix(parts, seed=2)


@given(
    st.lists(st.tuples(st.integers(20, 200), st.integers(1, 9)), min_size=2, max_size=4),
    st.one_of(st.none(), st.integers(100, 300)),
    st.integers(0, 9),
)
def test_shares_are_met_and_nothing_is_drawn_twice(
    sizes: list[tuple[int, int]], most: int | None, seed: int
) -> None:
    parts = [
        Part(f"p{i}", [replace(row, output_tokens=row.index + 1) for row in singles(n, i + 1)], s)
        for i, (n, s) in enumerate(sizes)
    ]
    rows = mix(parts, seed, most)
    assert len({(row.input_tokens, row.output_tokens) for row in rows}) == len(rows)
    weight = sum(share for _, share in sizes)
    total = min(min(n * weight / share for n, share in sizes), most or float("inf"))
    got = Counter(row.input_tokens for row in rows)
    for i, (_, share) in enumerate(sizes):
        assert total * share / weight - 1 < got[i + 1] <= total * share / weight + 1e-6


def test_sessions_stay_whole_and_apart() -> None:
    turns = [
        Row(2 * i + t, float(t), 100 * (t + 1), 10, str(i), 100 * t, turn=t + 1)
        for i in range(50)
        for t in (0, 1)
    ]
    blocked = [Row(i, 0.0, 64, 1, "0", 0, blocks=(range(i, i + 1),)) for i in range(50)]
    rows = mix([Part("a", turns, 1), Part("b", blocked, 1), Part("c", blocked, 1)], seed=0)
    seen: Counter[str] = Counter()
    for row in rows:
        assert row.session is not None
        if row.session.startswith("0/"):
            seen[row.session] += 1
            assert row.turn == seen[row.session]
    assert set(seen.values()) == {2}
    ids = [run[0] for row in rows for run in row.blocks or ()]
    assert len(set(ids)) == len(ids) == 100


def test_shares_that_leave_nothing() -> None:
    with pytest.raises(TraceError, match="no request of b"):
        mix([Part("a", singles(5, 1), 1000), Part("b", singles(5, 1), 1)], 0)
    with pytest.raises(ValueError, match="share of a"):
        Part("a", singles(5, 1), 0)


def test_recount_by_blocks() -> None:
    def row(index: int, tokens: int, *blocks: int, cached: int | None = None) -> Row:
        runs = tuple(range(block, block + 1) for block in blocks)
        return Row(index, 0.0, tokens, 1, None, cached, blocks=runs, block_tokens=64)

    rows = [row(0, 200, 1, 2, 3), row(1, 200, 1, 2, 9), row(2, 128, 1, 2), row(3, 256, 1, 2, 9, 7)]
    assert [r.cached_tokens for r in recount_cached(rows)] == [0, 128, 127, 192]
    left_out = [rows[0], rows[3]]
    assert [r.cached_tokens for r in recount_cached(left_out)] == [0, 128]
    said = [row(0, 200, 1, 2, 3, cached=64), row(1, 200, 1, 2, 9, cached=64)]
    assert [r.cached_tokens for r in recount_cached(said)] == [0, 64]


def test_recount_by_sessions() -> None:
    turns = [
        Row(0, 0.0, 100, 10, "a", 40, turn=1),  # a system prompt
        Row(1, 0.0, 150, 10, "a", 110, turn=2),
        Row(2, 0.0, 300, 10, "a", 160, turn=3),
        Row(3, 0.0, 50, 10, None, None),
    ]
    assert [r.cached_tokens for r in recount_cached(turns)] == [40, 110, 160, 0]
    assert [r.cached_tokens for r in recount_cached([turns[0], turns[2]])] == [40, 110]
    assert [r.cached_tokens for r in recount_cached(turns[1:])] == [0, 160, 0]
    assert recount_cached([Row(0, 0.0, 5, 1, None, 9)])[0].cached_tokens == 4
