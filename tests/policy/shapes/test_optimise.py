"""The choice is exact: no ladder of its structure is cheaper, found by trying all of them."""

from collections.abc import Iterator, Mapping
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.shapes.histogram import ShapeDemand, SizeCount
from pla_serve.policy.shapes.ladder import Footprint, Ladder, Layout, Shape, grid
from pla_serve.policy.shapes.optimise import (
    RESOLUTION,
    Budget,
    Structure,
    expected_seconds,
    optimise,
)


def cost(tokens: int, batch: int) -> float:
    return 10.0 + 3 * batch + tokens * batch


def eager(tokens: float, batch: int) -> float:
    return 30.0 + 3 * batch + tokens


cells = st.builds(Shape, st.sampled_from([1, 3, 8, 9, 30]), st.sampled_from([1, 2, 5, 6]))
fills = st.tuples(st.integers(1, 20), st.floats(0.1, 1))


def filled(cells: Mapping[Shape, tuple[int, float]]) -> ShapeDemand:
    """A share of each batch's slots is real."""
    return {
        size: SizeCount(float(weight), size.tokens * size.batch * share)
        for size, (weight, share) in cells.items()
    }


def full(cells: Mapping[Shape, float]) -> ShapeDemand:
    """No batch has padding of its own."""
    return filled({size: (weight, 1.0) for size, weight in cells.items()})


demands = st.dictionaries(cells, fills, min_size=1, max_size=7).map(filled)


def rows_seconds(shapes: tuple[Shape, ...], demand: ShapeDemand) -> float:
    """What the rule of rows gives: the band's batch size is the next one that has shapes."""
    total = 0.0
    for size, seen in demand.items():
        rows = [s.batch for s in shapes if s.batch >= size.batch]
        row = min(rows, default=0)
        levels = [s for s in shapes if s.batch == row and s.tokens >= size.tokens]
        captured = min((cost(*s) for s in levels), default=float("inf"))
        total += seen.weight * min(captured, eager(seen.tokens, size.batch))
    return total / sum(seen.weight for seen in demand.values())


def subsets(demand: ShapeDemand, most: int) -> Iterator[tuple[Shape, ...]]:
    tokens = {size.tokens for size in demand}
    batches = {size.batch for size in demand}
    every = [Shape(*pair) for pair in product(tokens, batches)]
    for count in range(min(most, len(every)) + 1):
        yield from combinations(every, count)


@settings(max_examples=60, deadline=None)
@given(demands, st.integers(0, 3))
def test_no_ladder_of_rows_is_cheaper(demand: ShapeDemand, most: int) -> None:
    choice = optimise(demand, cost, eager, Budget(shapes=most))
    best = min(rows_seconds(shapes, demand) for shapes in subsets(demand, most))
    assert len(choice.ladder.shapes) <= most
    assert choice.seconds == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(demands, st.integers(0, 3))
def test_a_server_gets_no_less_and_no_ladder_at_all_is_much_better(
    demand: ShapeDemand, most: int
) -> None:
    choice = optimise(demand, cost, eager, Budget(shapes=most), structure=Structure.BEST)
    real = expected_seconds(choice.ladder, demand)
    free = min(
        expected_seconds(Ladder(shapes, cost, eager=eager), demand)
        for shapes in subsets(demand, most)
    )
    assert free <= real + 1e-9
    assert real <= choice.seconds + 1e-9
    if most <= 1:
        assert real == pytest.approx(free)
    for structure in (Structure.ROWS, Structure.COLUMNS):
        one = optimise(demand, cost, eager, Budget(shapes=most), structure=structure)
        assert choice.seconds <= one.seconds + 1e-9


@settings(max_examples=60, deadline=None)
@given(demands, st.integers(0, 3))
def test_columns_are_rows_with_the_axes_swapped(demand: ShapeDemand, most: int) -> None:
    demand = full({size: seen.weight for size, seen in demand.items()})
    swapped = {Shape(size.batch, size.tokens): seen for size, seen in demand.items()}
    one = optimise(demand, cost, eager, Budget(shapes=most), structure=Structure.COLUMNS)
    two = optimise(
        swapped, lambda t, b: cost(b, t), lambda n, t: eager(n, round(n / t)), Budget(shapes=most)
    )
    assert one.seconds == pytest.approx(two.seconds)


@settings(max_examples=60, deadline=None)
@given(demands, st.integers(0, 400), st.integers(0, 60))
def test_budgets_in_bytes_and_seconds_hold_and_are_used(
    demand: ShapeDemand, memory: int, seconds: int
) -> None:
    """The footprint is in whole units of the budget, so that rounding up changes nothing."""
    footprint = Footprint(16.0, 2.0, bytes_per_slot=1.0)
    limit = float(max(1, memory // RESOLUTION) * RESOLUTION)
    budget = Budget(memory_bytes=limit, capture_seconds=float(seconds), footprint=footprint)
    choice = optimise(demand, cost, eager, budget)
    assert choice.ladder.memory_bytes(footprint) <= limit
    assert choice.ladder.capture_seconds(footprint) <= seconds
    unit = limit / RESOLUTION

    def fits(shapes: tuple[Shape, ...]) -> bool:
        rounded = [-(-footprint.bytes_of(s, Layout.PADDED) // unit) for s in shapes]
        return sum(rounded) <= RESOLUTION and 2 * len(shapes) <= seconds

    best = min(rows_seconds(s, demand) for s in subsets(demand, 3) if fits(s))
    assert choice.seconds <= best + 1e-9


def test_a_footprint_that_is_the_same_for_all_is_a_number_of_shapes() -> None:
    demand = full({Shape(n, batch): 1.0 for n in (5, 9, 20, 31) for batch in (1, 2, 3)})
    footprint = Footprint(bytes_per_shape=240e6, seconds_per_shape=10.0)
    by_memory = Budget(memory_bytes=5 * 240e6 + 1, footprint=footprint)
    by_time = Budget(shapes=9, capture_seconds=50.0, footprint=footprint)
    expected = optimise(demand, cost, eager, Budget(shapes=5))
    for budget in (by_memory, by_time):
        assert optimise(demand, cost, eager, budget).ladder.shapes == expected.ladder.shapes


def test_flat_shapes_are_chosen_by_total_tokens() -> None:
    demand = {
        Shape(100, 4): SizeCount(5.0, 100),
        Shape(120, 4): SizeCount(5.0, 120),
        Shape(700, 9): SizeCount(1.0, 700),
    }
    choice = optimise(
        demand,
        lambda tokens, batch: 1.0 + 0.01 * tokens,
        lambda tokens, batch: 9.0 + 0.01 * tokens,
        Budget(shapes=2),
        layout=Layout.FLAT,
    )
    assert choice.ladder.shapes == (Shape(120, 4), Shape(700, 9))
    assert choice.ladder.fit([60, 40]).shape == Shape(120, 4)


def test_all_shapes_it_may_have_leave_no_padding() -> None:
    demand = full({Shape(n, batch): 1.0 for n in (5, 9, 20) for batch in (1, 2, 3)})
    choice = optimise(demand, cost, lambda tokens, batch: 1e6, Budget(shapes=9))
    assert choice.seconds == pytest.approx(sum(cost(*size) for size in demand) / 9)


def test_it_is_better_than_the_grid_with_as_many_shapes() -> None:
    demand = {
        Shape(tokens, batch): SizeCount(1 / (tokens * batch), 0.7 * tokens * batch)
        for tokens in range(4, 257, 4)
        for batch in range(1, 17)
    }

    def captured(tokens: int, batch: int) -> float:
        return 5e-3 + 2e-5 * tokens * batch

    def ordinary(tokens: float, batch: int) -> float:
        return 15e-3 + 2e-5 * tokens

    fixed = grid(batches=(1, 2, 4, 8, 16))
    choice = optimise(demand, captured, ordinary, Budget(shapes=len(fixed)))
    before = expected_seconds(Ladder(fixed, captured, eager=ordinary), demand)
    after = expected_seconds(choice.ladder, demand)
    print(f"grid {before * 1e3:.3f} ms, chosen {after * 1e3:.3f} ms, {1 - after / before:.1%} less")
    assert after < 0.98 * before


def test_bad_arguments_are_refused() -> None:
    one = full({Shape(4, 1): 1.0, Shape(8, 1): 1.0})
    with pytest.raises(ValueError, match="cost falls"):
        optimise(one, lambda tokens, batch: -tokens, eager, Budget(shapes=1))
    with pytest.raises(ValueError, match="positive weight"):
        optimise({}, cost, eager, Budget(shapes=1))
    with pytest.raises(ValueError, match="positive weight"):
        optimise(full({Shape(1, 1): -1.0}), cost, eager, Budget(shapes=1))
    with pytest.raises(ValueError, match="give shapes"):
        Budget()
    with pytest.raises(ValueError, match="need footprint"):
        Budget(memory_bytes=1.0)
    with pytest.raises(ValueError, match="no batches were observed"):
        expected_seconds(Ladder([], cost), {})
    steep = Footprint(1.0, 1.0, bytes_per_slot=1.0, seconds_per_slot=1.0)
    both = Budget(shapes=1, memory_bytes=99.0, capture_seconds=99.0, footprint=steep)
    with pytest.raises(ValueError, match="states"):
        optimise(one, cost, eager, both)
