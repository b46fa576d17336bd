"""The seams of vLLM's queue: what its scheduler reads of it, and when."""

from __future__ import annotations

import pytest
from vllm.v1.request import Request, RequestStatus

from pla_serve.plugins.vllm.queue import HeldQueue
from tests.plugins.vllm.harness import make_request


def queue_of(*names: str) -> tuple[HeldQueue, list[Request]]:
    queue, requests = HeldQueue(), [make_request(name, 20) for name in names]
    for request in requests:
        queue.add_request(request)
    return queue, requests


def test_it_is_false_but_not_empty_while_nothing_is_on_offer() -> None:
    queue, _ = queue_of("a", "b")
    assert not queue
    assert len(queue) == 2
    with pytest.raises(IndexError, match="nothing on offer"):
        queue.peek_request()
    with pytest.raises(IndexError, match="nothing on offer"):
        queue.pop_request()


def test_peek_agrees_with_pop_in_the_order_of_the_offer() -> None:
    queue, (a, b, c) = queue_of("a", "b", "c")
    queue.offer([c, a])
    for expected in (c, a):
        assert queue.peek_request() is expected
        assert queue.pop_request() is expected
    assert not queue
    assert list(queue) == [b]


def test_what_was_not_admitted_stays_when_the_offer_is_withdrawn() -> None:
    queue, (a, _) = queue_of("a", "b")
    queue.offer([a])
    queue.withdraw()
    assert not queue
    assert len(queue) == 2
    queue.offer([a])
    assert queue.pop_request() is a


def test_removing_absent_requests_is_ignored_and_an_offer_shrinks_with_the_queue() -> None:
    queue, (a, b) = queue_of("a", "b")
    queue.offer([a, b])
    queue.remove_requests([make_request("elsewhere", 5), a])
    assert queue.peek_request() is b
    assert len(queue) == 1
    with pytest.raises(ValueError, match="not in the queue"):
        queue.remove_request(a)
    queue.remove_request(b)
    assert not queue
    assert len(queue) == 0


def test_preempted_requests_are_urgent_the_last_one_first() -> None:
    queue, (a, b, c) = queue_of("a", "b", "c")
    queue.remove_requests([a, c])
    for request in (a, c):
        request.status = RequestStatus.PREEMPTED
        queue.prepend_request(request)
    assert queue.urgent == [c, a]
    assert list(queue) == [c, a, b]
    assert queue.take_arrivals() == [b]


def test_arrivals_are_told_once_and_not_if_they_left_meanwhile() -> None:
    queue, (a, b) = queue_of("a", "b")
    queue.remove_requests([a])
    assert queue.take_arrivals() == [b]
    assert queue.take_arrivals() == []


def test_requests_that_a_step_skipped_come_back() -> None:
    queue, (a, b) = queue_of("a", "b")
    queue.take_arrivals()
    queue.offer([a])
    skipped = queue.pop_request()
    queue.prepend_requests([skipped])
    assert len(queue) == 2
    assert queue.take_arrivals() == [a]
    assert queue.get("a") is a
    assert queue.get("b") is b
