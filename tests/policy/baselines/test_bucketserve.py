"""Buckets split where requests crowd, merge when few are left, and never share a batch."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.baselines.bucketserve import BucketOptions, BucketQueue
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.pending import Pending
from tests.policy.baselines.helpers import add, make, step

OPTIONS = BucketOptions(longest_tokens=1024)


def pending(order: int, tokens: int, priority: int = 0, arrival: float | None = None) -> Pending:
    at = float(order) if arrival is None else arrival
    return Pending(f"r{order}", at, None, priority, order, tokens, 0, True, tokens * 1e-3, None)


def filled(
    *tokens: int, most: int = 4, most_tokens: int = 9999, options: BucketOptions = OPTIONS
) -> BucketQueue:
    queue = BucketQueue(options, most, most_tokens)
    for order, count in enumerate(tokens):
        queue.push(pending(order, count))
    return queue


def bounds(queue: BucketQueue) -> list[int]:
    return [bucket.low for bucket in queue.buckets]


def take(queue: BucketQueue, most: int) -> list[int]:
    """One round."""
    taken = []
    for request in queue.drain(0.0):
        taken.append(request.new_tokens)
        if len(taken) == most:
            break
    return taken


def test_a_crowd_of_shorts_splits_at_midpoints() -> None:
    queue = filled(1000, 10, 20, 30, 40, 50)
    assert bounds(queue) == [0]
    assert take(queue, 4) == [1000], "it came first, and nothing else is of its length"
    assert bounds(queue) == [0, 32, 64, 128, 256, 512], "until a batch takes each"
    assert take(queue, 4) == [10, 20, 30]
    assert take(queue, 4) == [40, 50]


def test_tokens_make_a_crowd_too() -> None:
    queue = filled(1000, 10, 20, most_tokens=1029)
    assert take(queue, 4) == [1000]
    assert bounds(queue) == [0, 512]
    assert take(filled(1000, 10, 20, most_tokens=1030), 4) == [1000, 10, 20]


def test_no_split_without_skew() -> None:
    longs = filled(1000, 900, 800, 700, 10, 20)
    assert take(longs, 1) == [1000]
    assert bounds(longs) == [0]


def test_merged_when_one_batch_takes_all() -> None:
    queue = filled(1000, 10, 20, 30, 40, 50)
    take(queue, 4)
    assert len(queue) == 5
    take(queue, 1)
    assert len(bounds(queue)) > 1
    assert take(queue, 9) == [20, 30, 40, 50]
    assert bounds(queue) == [0]


@pytest.mark.parametrize(("order", "first"), [("fcfs", 1000), ("sjf", 10)])
def test_which_bucket_is_next(order: Literal["fcfs", "sjf"], first: int) -> None:
    options = BucketOptions(longest_tokens=1024, order=order)
    assert take(filled(1000, 10, 20, 30, 40, 50, options=options), 1) == [first]


def test_priority_goes_before_the_order_of_buckets() -> None:
    queue = filled(10, 20, 30, 40, 50)
    queue.push(pending(9, 900, priority=-1))
    assert take(queue, 4) == [900]


@given(
    moves=st.lists(
        st.one_of(st.integers(1, 2000), st.sampled_from(["drain", "discard"])), max_size=80
    ),
    skew=st.sampled_from([0.0, 0.5, 0.9]),
    order=st.sampled_from(["fcfs", "sjf"]),
    most=st.integers(1, 6),
    most_tokens=st.sampled_from([100, 3000]),
)
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost_and_every_request_lies_in_its_bucket(
    moves: list[int | str], skew: float, order: Literal["fcfs", "sjf"], most: int, most_tokens: int
) -> None:
    options = BucketOptions(longest_tokens=1024, skew=skew, order=order)
    queue = BucketQueue(options, most, most_tokens)
    inside: dict[str, Pending] = {}
    for number, move in enumerate(moves):
        if isinstance(move, int):
            inside[f"r{number}"] = pending(number, move)
            queue.push(inside[f"r{number}"])
        elif move == "discard":
            for request in list(inside.values())[:1]:
                queue.discard(request)
                queue.discard(request)  # a second time changes nothing
                del inside[request.id]
        else:
            taken = []
            for request in queue.drain(0.0):
                taken.append(inside.pop(request.id))
                if len(taken) == most:
                    break
            arrivals = [request.arrival for request in taken]
            assert arrivals == sorted(arrivals)
            assert bool(taken) or not inside
            places = {sum(low <= r.new_tokens for low in bounds(queue)) for r in taken}
            assert len(places) <= 1, "two buckets in a batch"
        assert len(queue) == len(inside)
    for bucket in queue.buckets:
        for request in bucket.queue.requests():
            assert bucket.low <= request.new_tokens
            assert request.new_tokens < bucket.high or bucket.high == 1024
        below = [r for r in bucket.queue.requests() if r.new_tokens < bucket.middle]
        assert bucket.below == len(below)
        assert bucket.tokens == sum(r.new_tokens for r in bucket.queue.requests())


def test_the_policy_batches_by_length() -> None:
    config = PolicyConfig(max_batch_tokens=1000, max_batch_requests=3)
    policy = make("bucketserve:longest_tokens=1024", config)
    add(policy, "long", 800)
    for number in range(5):
        add(policy, f"s{number}", 10, 0.1)
    add(policy, "late", 900, 0.2)
    assert step(policy, 1.0) == [("long", 800), ("late", 200)]
    assert step(policy, 1.1) == [("late", 700)], "what has begun goes on first"
    assert step(policy, 1.2) == [("s0", 10), ("s1", 10), ("s2", 10)]
    assert step(policy, 1.3) == [("s3", 10), ("s4", 10)]


@pytest.mark.parametrize(("field", "value"), [("longest_tokens", 0), ("skew", 1.0)])
def test_options_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        BucketOptions(**{field: value})  # type: ignore[arg-type]
