"""Who is saved: queues against brute force over all orders."""

from __future__ import annotations

from itertools import permutations
from math import inf, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.longs import LongQueue
from pla_serve.policy.pending import Pending
from pla_serve.policy.queues import DEMOTIONS, PATIENCE, DueQueue, SortedQueue

SLACK = 1e-9


def window(seconds: float) -> float:
    return 20 * sqrt(seconds)


def long_queue(light: bool) -> LongQueue:
    return LongQueue(lambda seconds: window(seconds) / (80 if light else 1), window)


@st.composite
def crowds(draw: st.DrawFn, most: int = 5, arrivals: float = 0.0) -> list[Pending]:
    """Few requests of whole eighths of a second; many of their deadlines can just be met. With
    ``arrivals`` (the latest one), some are over before the request comes."""
    eighths = st.integers(1, 10).map(lambda number: number / 8)
    crowd = []
    for order in range(draw(st.integers(1, most))):
        arrival = draw(st.floats(0, arrivals)) if arrivals else 0.0
        earliest = -160 if arrivals else 1
        deadline = draw(st.none() | st.integers(earliest, 32).map(lambda number: number / 8))
        due = None if deadline is None else arrival + deadline
        seconds = draw(eighths)
        crowd.append(
            Pending(f"r{order}", arrival, due, 0, order, 10, 0, seconds < 0.6, seconds, None)
        )
    return crowd


def met(order: list[Pending] | tuple[Pending, ...]) -> int:
    """Deadlines met if they run one after another from 0 on."""
    now, count = 0.0, 0
    for request in order:
        now += request.seconds
        count += request.deadline is not None and now <= request.deadline + SLACK
    return count


def serve(queue: SortedQueue, crowd: list[Pending]) -> list[Pending]:
    """One after another, each taken when the one before it ends."""
    for request in crowd:
        queue.push(request)
    now, order = 0.0, []
    while len(queue):
        order.append(take(queue, now))
        now += order[-1].seconds
    return order


def take(queue: SortedQueue, now: float) -> Pending:
    if isinstance(queue, LongQueue):
        head = queue.head(now)
        assert head is not None
        queue.discard(head)
        return head
    return next(iter(queue.drain(now)))


@given(crowds())
@settings(max_examples=300)
def test_shorts_meet_every_deadline_if_any_order_does(crowd: list[Pending]) -> None:
    wanted = sum(request.deadline is not None for request in crowd)
    best = max(met(order) for order in permutations(crowd))
    if best == wanted:
        assert met(serve(DueQueue(), crowd)) == wanted


@given(crowds())
@settings(max_examples=300)
def test_longs_of_one_size_meet_every_deadline_if_any_order_does(crowd: list[Pending]) -> None:
    """As long as patience leaves deadlines the first word. (Of two sizes, the one that has to
    start first goes first, which is not always the best order.)"""
    for request in crowd:
        request.seconds = 0.75
    wanted = sum(request.deadline is not None for request in crowd)
    best = max(met(order) for order in permutations(crowd))
    if best == wanted:
        queue = LongQueue(lambda seconds: 100.0, lambda seconds: 100.0)
        assert met(serve(queue, crowd)) == wanted


def can_meet(request: Pending, now: float) -> bool:
    return request.deadline is not None and now + request.seconds <= request.deadline


def cannot_meet(request: Pending, now: float) -> bool:
    return request.deadline is not None and now + request.seconds > request.deadline


@given(
    crowd=crowds(most=12, arrivals=20.0),
    kind=st.sampled_from(["short", "long", "light"]),
    wait=st.floats(0, 10),
)
@settings(max_examples=300)
def test_nothing_lost_goes_before_what_can_be_saved(
    crowd: list[Pending], kind: str, wait: float
) -> None:
    """But for one that has stood back for its time: then it goes, whoever came since."""
    queue: SortedQueue = DueQueue() if kind == "short" else long_queue(kind == "light")
    for request in crowd:
        queue.push(request)
    now, left = max(request.arrival for request in crowd) + wait, list(crowd)
    while left:
        lost = sum(cannot_meet(request, now) and not request.late for request in left)
        choice = take(queue, now)
        left.remove(choice)
        saved = [request for request in left if can_meet(request, now)]
        if cannot_meet(choice, now) and saved and lost <= DEMOTIONS:
            stood = 2 * PATIENCE if kind == "short" else window(choice.seconds)
            assert choice.late
            for other in saved:
                assert other.deadline is not None
                latest = other.deadline if kind == "short" else other.deadline - other.seconds
                patience = PATIENCE if kind == "short" else queue_patience(kind, other)
                due = min(latest, other.arrival + patience)
                assert choice.arrival + stood <= due + SLACK
        now += choice.seconds


def queue_patience(kind: str, request: Pending) -> float:
    return window(request.seconds) / (80 if kind == "light" else 1)


@pytest.mark.parametrize("kind", ["short", "long", "light"])
@given(crowd=crowds(most=12, arrivals=20.0), wait=st.floats(0, 10))
def test_no_one_is_passed_by_those_who_come_after_its_time(
    kind: str, crowd: list[Pending], wait: float
) -> None:
    queue: SortedQueue = DueQueue() if kind == "short" else long_queue(kind == "light")
    for request in crowd:
        queue.push(request)
    now, place = 20.0 + wait, dict[str, int]()
    for number in range(len(crowd)):
        place[take(queue, now).id] = number
    for one in crowd:
        bound = 2 * PATIENCE if kind == "short" else window(one.seconds)
        for other in crowd:
            if place[other.id] < place[one.id]:
                assert other.arrival <= one.arrival + bound + SLACK


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=30), st.floats(0, 100))
def test_a_demotion_happens_once_and_a_look_makes_only_so_many(
    seconds: list[float], now: float
) -> None:
    queue = long_queue(light=True)
    crowd = [
        Pending(f"r{n}", 0.0, 0.0, 0, n, 10, 0, False, each, None) for n, each in enumerate(seconds)
    ]
    for request in crowd:
        queue.push(request)
    for look in range(1, 10):
        assert queue.head(now) is not None
        assert sum(request.late for request in crowd) <= look * DEMOTIONS
    assert len(queue) == len(crowd)
    assert not any(queue.give_up(request, inf) for request in crowd if request.late)


def test_one_that_runs_and_cannot_be_saved_is_noticed_without_being_queued() -> None:
    queue = long_queue(light=True)
    running = Pending("r", 0.0, 4.0, 0, 1, 10, 0, False, 5.0, None)
    assert not queue.give_up(running, 2.0, less=3.0)
    assert queue.give_up(running, 2.0, less=2.9)
    assert len(queue) == 0
    assert queue.due(running) == window(5.0)
