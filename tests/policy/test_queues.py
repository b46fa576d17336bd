"""Orders against their definitions, worked out by brute force."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.baselines.hrrn import STEPS_PER_OCTAVE, ResponseRatioQueue
from pla_serve.policy.decodes import DecodePool
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import Chunk
from pla_serve.policy.queues import (
    DEMOTIONS,
    DueQueue,
    PrefillQueue,
    SortedQueue,
    aged_rank,
    arrival_rank,
)


def pending(
    order: int,
    arrival: float = 0.0,
    seconds: float = 1.0,
    deadline: float | None = None,
    priority: int = 0,
    started: bool = False,
) -> Pending:
    name = f"r{order}"
    return Pending(
        name, arrival, deadline, priority, order, 10, 0, True, seconds, None, started=started
    )


@st.composite
def crowds(draw: st.DrawFn) -> list[Pending]:
    return [
        pending(
            order,
            draw(st.floats(0, 100)),
            draw(st.floats(1e-3, 100)),
            priority=draw(st.integers(0, 2)),
            started=draw(st.booleans()),
        )
        for order in range(draw(st.integers(0, 40)))
    ]


QUEUES: list[Callable[[], PrefillQueue]] = [
    lambda: SortedQueue(arrival_rank),
    lambda: SortedQueue(aged_rank(1.0)),
    DueQueue,
    ResponseRatioQueue,
]


@pytest.mark.parametrize("make", QUEUES)
@given(crowd=crowds(), data=st.data())
@settings(max_examples=40)
def test_nothing_is_lost_or_doubled(
    make: Callable[[], PrefillQueue], crowd: list[Pending], data: st.DataObject
) -> None:
    queue, inside = make(), set[str]()
    for request in crowd:
        queue.push(request)
        inside.add(request.id)
        if data.draw(st.integers(0, 3)) == 0:
            gone = data.draw(st.sampled_from(crowd))
            queue.discard(gone)
            inside.discard(gone.id)
        if data.draw(st.integers(0, 5)) == 0 and queue:
            inside.remove(next(iter(queue.drain(50.0))).id)
        assert len(queue) == len(inside)
    queue.resort()
    drained = [request.id for request in queue.drain(100.0)]
    assert sorted(drained) == sorted(inside)
    assert len(queue) == 0


@given(crowd=crowds(), aging=st.sampled_from([0.0, 0.3, 1.0]), now=st.floats(100, 1000))
def test_static_key_is_aged_shortest_remaining_first(
    crowd: list[Pending], aging: float, now: float
) -> None:
    """remaining - aging * waited, evaluated at any moment, gives the order of the key."""
    queue = SortedQueue(aged_rank(aging))
    for request in crowd:
        queue.push(request)
    scores = [
        (request.priority, request.seconds - aging * (now - request.arrival))
        for request in queue.drain(now)
    ]
    assert all(a[0] < b[0] or (a[0] == b[0] and a[1] <= b[1] + 1e-6) for a, b in pairwise(scores))


@given(crowds())
def test_arrival_order(crowd: list[Pending]) -> None:
    queue = SortedQueue(arrival_rank)
    for request in crowd:
        queue.push(request)
    expected = sorted(crowd, key=lambda r: (r.priority, not r.started, r.arrival, r.order))
    assert list(queue.drain(0.0)) == expected


@given(crowds(), st.floats(100, 1000))
def test_response_ratio_is_near_the_highest(crowd: list[Pending], now: float) -> None:
    """Each choice's wait / service is at least 84% (a quarter of an octave) of the best one's."""
    queue = ResponseRatioQueue()
    for request in crowd:
        request.started = False
        queue.push(request)
    left = set(crowd)
    for choice in queue.drain(now):
        peers = [r for r in left if r.priority == choice.priority]
        assert choice.priority == min(r.priority for r in left)
        best = max((now - r.arrival) / r.seconds for r in peers)
        near = best * 2 ** (-1 / STEPS_PER_OCTAVE)
        assert (now - choice.arrival) / choice.seconds >= near * (1 - 1e-9)
        left.remove(choice)


def test_response_ratio_prefers_long_waits_and_short_services() -> None:
    queue = ResponseRatioQueue()
    for request in (pending(1, 0.0, 10.0), pending(2, 8.0, 1.0), pending(3, 0.0, 40.0)):
        queue.push(request)
    assert [r.order for r in queue.drain(10.0)] == [2, 1, 3]  # ratios 3, 2, 1.25


class TestDueQueue:
    def order(self, *requests: Pending, now: float = 0.0) -> list[int]:
        queue = DueQueue()
        for request in requests:
            queue.push(request)
        return [request.order for request in queue.drain(now)]

    def test_deadlines_move_forward_only(self) -> None:
        generous = pending(1, 0.0, deadline=1000.0)
        plain = pending(2, 1.0)
        tight = pending(3, 2.0, deadline=3.5)
        assert self.order(generous, plain, tight, now=2.0) == [3, 1, 2]

    def test_a_lost_cause_steps_behind_once(self) -> None:
        lost = pending(1, 0.0, deadline=0.5)
        saved = pending(2, 0.0, deadline=1.5)
        plain = pending(3, 4.9)
        later = pending(4, 5.1)
        assert self.order(lost, saved, plain, later, now=0.0) == [2, 3, 1, 4]

    def test_a_decision_demotes_only_so_many(self) -> None:
        crowd = [pending(n, float(n) / 100, deadline=0.1) for n in range(3 * DEMOTIONS)]
        queue = DueQueue()
        for request in crowd:
            queue.push(request)
        next(iter(queue.drain(50.0)))
        assert sum(request.late for request in crowd) == DEMOTIONS


@given(crowd=crowds(), position=st.floats(0, 200))
def test_seconds_ahead_is_exact_for_few_and_near_for_many(
    crowd: list[Pending], position: float
) -> None:
    queue = SortedQueue(aged_rank(1.0))
    for request in crowd:
        request.priority = 0
        queue.push(request)
    probe = pending(99, position, 0.5)
    ahead = [r.seconds for r in crowd if r.seconds + r.arrival <= position + 0.5]
    total = sum(r.seconds for r in crowd)
    estimate = queue.seconds_ahead(probe, total)
    if len(ahead) < 32:
        assert estimate == pytest.approx(min(sum(ahead), total))
    assert 0 <= estimate <= total


def test_seconds_ahead_of_a_thousand() -> None:
    queue = SortedQueue(aged_rank(0.0))
    for order in range(1000):
        queue.push(pending(order, seconds=float(order)))
    estimate = queue.seconds_ahead(pending(1001, seconds=499.5), 1e9)
    assert estimate == pytest.approx(499 * 500 / 2, rel=0.05)


class TestDecodePool:
    def test_turns_and_contexts(self) -> None:
        pool = DecodePool()
        for name, context in (("a", 10), ("b", 20), ("c", 30)):
            pool.start(name, context, 0.0)
        assert pool.mean_context == 20
        first = pool.take(2)
        assert first == [Chunk("a", 1, 10), Chunk("b", 1, 20)]
        assert (len(pool), pool.total, pool.mean_context) == (1, 3, 30)
        pool.settle(tuple(first), 1.0)
        assert pool.take(9) == [Chunk("c", 1, 30), Chunk("a", 1, 11), Chunk("b", 1, 21)]
        assert pool.take(9) == []
        assert pool.mean_context == 0

    def test_the_first_due_goes_first_among_targets(self) -> None:
        pool = DecodePool()
        pool.start("patient", 1, 0.0, tpot=4.0)
        pool.start("default", 1, 1.0)
        pool.start("quick", 1, 2.0, tpot=0.5)
        assert pool.first_due(9.0) == 2.5
        assert pool.first_due(1.0) == 2.0
        assert pool.first_due(1.0, least=3.5) == 4.0
        assert [chunk.request_id for chunk in pool.take(2, 9.0)] == ["quick", "patient"]
        assert pool.first_due(9.0) == 10.0
        pool.discard("default")
        assert pool.first_due(9.0) == float("inf")
        assert (len(pool), pool.total, pool.context) == (0, 2, 2)

    def test_removed_in_flight_stays_away(self) -> None:
        pool = DecodePool()
        pool.start("a", 10, 0.0)
        flight = tuple(pool.take(1))
        pool.discard("a")
        pool.settle(flight, 1.0)
        assert pool.total == 0
        pool.start("a", 40, 0.5)
        pool.settle(flight, 1.0)
        assert pool.take(1) == [Chunk("a", 1, 40)]
