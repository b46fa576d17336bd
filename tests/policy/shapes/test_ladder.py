"""The nearest shape is the cheapest that covers, and every fallback has its reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.shapes.ladder import (
    Fallback,
    Footprint,
    Ladder,
    Layout,
    Shape,
    grid,
    size_of,
    slots,
)


def cost(tokens: int, batch: int) -> float:
    return 5.0 + tokens * batch


shapes = st.builds(Shape, st.integers(1, 40), st.integers(1, 8))
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(st.lists(shapes, max_size=12), lengths, st.sampled_from(Layout))
def test_the_nearest_shape_is_the_cheapest_that_covers(
    some: list[Shape], batch: list[int], layout: Layout
) -> None:
    tokens = max(batch) if layout is Layout.PADDED else sum(batch)
    covering = [s for s in some if s.tokens >= tokens and s.batch >= len(batch)]
    ladder = Ladder(some, cost, layout=layout)
    found = ladder.fit(batch)
    if not covering:
        assert found.shape is None
        assert found.reason in set(Fallback) - {Fallback.PADDING, Fallback.CHEAPER}
        return
    assert found.reason is None
    assert found.shape in covering
    assert found.seconds == min(cost(*s) for s in covering)
    assert found.waste == pytest.approx(1 - sum(batch) / slots(found.shape, layout))
    assert ladder.nearest(size_of(batch, layout)) == found.shape


def test_the_published_grid() -> None:
    ladder = Ladder(grid(), cost)
    assert len(ladder.shapes) == 42
    assert ladder.fit([9, 3, 16]).shape == Shape(16, 4)
    assert ladder.fit([9, 3, 16]).waste == pytest.approx(1 - 28 / 64)
    assert ladder.level(33) == 64
    assert ladder.level(257) is None
    assert ladder.capacity() == ladder.capacity(256) == 64
    assert ladder.capacity(257) == 0
    small = ladder.within(64 * 8)
    assert small.capacity() == 64
    assert small.capacity(16) == 32
    assert small.fit([9, 3, 16]) == ladder.fit([9, 3, 16])
    assert ladder.within(7).shapes == ()


def test_reasons_for_a_fallback() -> None:
    ladder = Ladder([Shape(32, 1), Shape(8, 4)], cost, padding_cap=0.5)
    assert Ladder([], cost).fit([1]).reason is Fallback.NO_SHAPES
    assert ladder.fit([33]).reason is Fallback.TOO_LONG
    assert ladder.fit([8] * 5).reason is Fallback.TOO_MANY
    assert ladder.fit([9, 9]).reason is Fallback.NOT_COVERED
    assert ladder.fit([1]).reason is Fallback.PADDING
    assert ladder.fit([16]).reason is None


def test_the_ordinary_kernels_run_what_they_run_no_slower() -> None:
    ladder = Ladder([Shape(32, 2)], cost, eager=lambda tokens, batch: 20.0 + tokens)
    cheaper = ladder.fit([10, 10])
    assert cheaper.reason is Fallback.CHEAPER
    assert cheaper.seconds == 40.0
    assert ladder.fit([32, 32]).shape == Shape(32, 2)
    assert ladder.fit([40]).seconds == 60.0


def test_accounting() -> None:
    ladder = Ladder([Shape(8, 2), Shape(8, 2), Shape(4, 1)], cost)
    footprint = Footprint(100.0, 2.0, bytes_per_slot=10.0, seconds_per_slot=0.5)
    assert ladder.memory_bytes(footprint) == 2 * 100 + 10 * (16 + 4)
    assert ladder.capture_seconds(footprint) == 2 * 2 + 0.5 * (16 + 4)
    flat = Ladder([Shape(8, 2), Shape(4, 1)], cost, layout=Layout.FLAT)
    assert flat.memory_bytes(footprint) == 2 * 100 + 10 * (8 + 4)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Ladder([Shape(0, 1)], cost)
    with pytest.raises(ValueError, match=r"padding_cap must lie in 0\.\.1"):
        Ladder([], cost, padding_cap=1.5)
    with pytest.raises(ValueError, match="a batch needs lengths"):
        Ladder([], cost).fit([])
