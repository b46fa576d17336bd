"""Counts decay with counts, and their memory is bounded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.shapes import histogram as module
from pla_serve.policy.shapes.histogram import ShapeHistogram
from pla_serve.policy.shapes.ladder import Shape

sizes = st.builds(Shape, st.integers(1, 20), st.integers(1, 6))


@given(st.lists(sizes, max_size=60))
def test_it_is_a_decayed_count(seen: list[Shape]) -> None:
    histogram = ShapeHistogram(16, 4, granularity=4, half_life=10)
    expected: dict[Shape, float] = {}
    tokens: dict[Shape, float] = {}
    outside = 0.0
    for age, size in enumerate(reversed(seen)):
        weight = 0.5 ** (age / 10)
        if size.tokens > 16 or size.batch > 4:
            outside += weight
        else:
            key = Shape(-(-size.tokens // 4) * 4, size.batch)
            expected[key] = expected.get(key, 0.0) + weight
            tokens[key] = tokens.get(key, 0.0) + weight * size.tokens
    for size in seen:
        histogram.record(size, size.tokens)
    demand = histogram.demand()
    assert {size: seen.weight for size, seen in demand.items()} == pytest.approx(expected)
    for size, seen in demand.items():
        assert seen.tokens == pytest.approx(tokens[size] / expected[size])
    assert histogram.outside == pytest.approx(outside)


def test_it_counts_on_when_its_unit_is_rescaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESCALE_AT", 100.0)
    histogram = ShapeHistogram(4, 4, half_life=1)
    for _ in range(1000):
        histogram.record(Shape(1, 1), 7)
        histogram.record(Shape(9, 1), 9)
    assert histogram.outside == pytest.approx(4 / 3)
    assert histogram.demand() == {Shape(1, 1): pytest.approx((2 / 3, 7))}


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        ShapeHistogram(0)
    with pytest.raises(ValueError, match="at least one token"):
        ShapeHistogram().record(Shape(0, 1), 1)
