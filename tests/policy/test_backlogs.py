"""A tenant that comes when another one has much waiting: bounded work, and no order is lost."""

from __future__ import annotations

import sys
from random import Random
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.registry import POLICIES
from tests.policy.test_tenants import Device


class Calls:
    """Counts calls of Python functions, the time of a machine that is never busy otherwise."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        self.count = 0
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        self.count += event in ("call", "c_call")


def calls_of_join(name: str, waiting: int) -> tuple[int, int]:
    """Calls of the first request of a second tenant, and most calls of what follows it."""
    device, calls = Device(name), Calls()
    for index in range(waiting):
        device.add("a", 20 + 13 * index % 200)
    for _ in range(4):
        device.step()
    with calls:
        device.add("b", 30)
    join, most = calls.count, 0
    device.policy.remove("b" + str(waiting))  # the tenant goes again, and comes back
    for _ in range(6):
        with calls:
            device.step()
        most = max(most, calls.count)
    with calls:
        device.add("b", 30)
    return max(join, calls.count), most


@pytest.mark.parametrize("name", POLICIES)
def test_a_backlog_is_set_aside_at_once(name: str) -> None:
    few, many = calls_of_join(name, 300), calls_of_join(name, 3000)
    assert many[0] <= 2 * few[0] + 200
    assert many[1] <= 2 * few[1] + 3000, "what is held comes back a bounded number at a time"


events = st.lists(
    st.sampled_from(["join", "leave", "step", "step", "add", "abort"]), min_size=5, max_size=60
)


@pytest.mark.parametrize("name", POLICIES)
@given(events=events, seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_everything_is_served_once_whoever_comes_and_goes(
    name: str, events: list[str], seed: int
) -> None:
    device, rng = Device(name), Random(seed)
    waiting = {device.add("a", rng.choice((5, 40, 250, 700))) for _ in range(120)}
    guests: list[str] = []
    for event in events:
        if event == "join":
            guests.append(device.add(rng.choice("bc"), rng.choice((5, 300))))
            waiting.add(guests[-1])
        elif event == "leave":
            while guests:
                gone = guests.pop()
                device.policy.remove(gone)
                waiting.discard(gone)
        elif event == "add":
            waiting.add(device.add("a", rng.choice((5, 40, 250, 700))))
        elif event == "abort" and waiting:
            gone = rng.choice(sorted(waiting))
            device.policy.remove(gone)
            waiting.discard(gone)
        else:
            done = device.step()
            assert waiting.issuperset(done), "it was served twice, or after it was aborted"
            waiting.difference_update(done)
    for _ in range(3000):
        if not waiting:
            break
        waiting.difference_update(device.step())
    assert not waiting
    book = device.policy._book  # type: ignore[attr-defined]
    assert not list(book._all())
    for shares in book._shares:
        assert not shares.tenants
        assert not shares._charged


@given(events=events, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_tenants_own_order_is_that_of_arrival(events: list[str], seed: int) -> None:
    """Under first come, first served, whatever was set aside, held, and taken back."""
    device, rng = Device("fcfs"), Random(seed)
    order: list[str] = []
    begun: list[str] = []

    def add() -> None:
        device.now += 1e-6
        order.append(device.add("a", rng.randint(1, 60)))

    def step() -> None:
        done = device.step()
        begun.extend(name for name in done if name.startswith("a"))

    for _ in range(150):
        add()
    guests: list[str] = []
    for event in events:
        if event == "join":
            guests.append(device.add("b", 30))
        elif event == "leave":
            while guests:
                device.policy.remove(guests.pop())
        elif event == "add":
            add()
        else:
            step()
    for _ in range(2000):
        if len(begun) == len(order):
            break
        step()
    assert begun == order
