"""BucketServe's split, by hand."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.shapes.histogram import SizeCount
from pla_serve.policy.shapes.ladder import Shape
from pla_serve.policy.shapes.midpoint import MidpointBucket, midpoint_shapes, midpoint_split


def test_a_skewed_bucket_is_split_at_its_midpoint() -> None:
    lengths = {10: 6.0, 100: 4.0}
    assert midpoint_split(lengths, 127, most=2) == (MidpointBucket(0, 64), MidpointBucket(64, 128))
    assert midpoint_split(lengths, 127, most=3) == (
        MidpointBucket(0, 32),
        MidpointBucket(32, 64),
        MidpointBucket(64, 128),
    )


def test_a_bucket_whose_weight_is_above_the_midpoint_stays() -> None:
    assert midpoint_split({100: 6.0, 10: 4.0}, 127) == (MidpointBucket(0, 128),)
    assert midpoint_split({10: 5.0, 100: 5.0}, 127) == (MidpointBucket(0, 128),)


def test_few_requests_share_one_bucket() -> None:
    assert midpoint_split({10: 6.0, 100: 4.0}, 127, capacity=10) == (MidpointBucket(0, 128),)
    assert midpoint_split({10: 6.0, 100: 4.0}, 127, capacity=9) == (
        MidpointBucket(0, 64),
        MidpointBucket(64, 128),
    )


@given(
    st.dictionaries(st.integers(1, 200), st.floats(0.1, 10), min_size=1),
    st.integers(1, 12),
    st.floats(0, 1),
)
def test_buckets_tile_all_lengths(lengths: dict[int, float], most: int, theta: float) -> None:
    buckets = midpoint_split(lengths, 200, most=most, theta=theta)
    assert buckets[0].low == 0
    assert buckets[-1].high == 201
    assert all(a.high == b.low for a, b in pairwise(buckets))
    assert len(buckets) <= most


def test_without_a_limit_it_ends() -> None:
    assert len(midpoint_split({1: 1.0}, 1000)) < 12


def test_shapes_are_the_longest_of_each_bucket() -> None:
    demand = {Shape(10, 2): SizeCount(6.0, 20), Shape(127, 1): SizeCount(4.0, 127)}
    assert midpoint_shapes(demand, 5, (1, 2)) == (
        Shape(63, 1),
        Shape(63, 2),
        Shape(127, 1),
        Shape(127, 2),
    )


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        midpoint_split({}, 0)
    with pytest.raises(ValueError, match="theta"):
        midpoint_split({}, 1, theta=2)
    with pytest.raises(ValueError, match="no room"):
        midpoint_shapes({Shape(1, 1): SizeCount(1.0, 1)}, 1, (1, 2))
