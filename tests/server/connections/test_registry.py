"""Who is closed when there are too many connections, or when they take too long."""

from __future__ import annotations

import asyncio
import socket

import pytest

from pla_serve.server.connections.acceptor import Acceptor
from pla_serve.server.connections.registry import MOST_HEAD_BYTES, ConnectionRegistry
from pla_serve.server.limits import Limits
from pla_serve.server.loop_lag import LoopLag


class FakeConnection:
    def __init__(self, address: str = "10.0.0.1", deadline: float = 1e9) -> None:
        self.address = address
        self.deadline = deadline
        self.closed = ""

    def overdue(self, now: float) -> bool:
        return now >= self.deadline

    def expire(self) -> None:
        self.closed = "expired"

    def drop(self) -> None:
        self.closed = "dropped"


class Timers:
    """Stands for an event loop: keeps timers instead of running them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.callbacks: list[object] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, callback: object) -> object:
        self.callbacks.append(callback)
        return callback


def make(timers: Timers | None = None, **limits: float) -> ConnectionRegistry:
    return ConnectionRegistry(Limits(**limits), loop=timers or Timers())  # type: ignore[arg-type]


def test_the_one_that_waited_longest_makes_room_and_new_ones_before_idle_ones() -> None:
    registry = make(max_connections=3)
    idle, first, second = (FakeConnection() for _ in range(3))
    for connection in (idle, first, second):
        assert registry.add(connection)
    registry.began(idle)
    registry.ended(idle)  # it has had an answer
    third = FakeConnection()
    assert registry.add(third)
    assert first.closed == "dropped"
    registry.began(second)
    registry.began(third)
    assert registry.add(FakeConnection())
    assert idle.closed == "dropped"
    assert len(registry) == 3


def test_connections_with_a_request_are_never_closed_for_others() -> None:
    registry = make(max_connections=2)
    busy = [FakeConnection(), FakeConnection()]
    for connection in busy:
        assert registry.add(connection)
        registry.began(connection)
    assert not registry.add(FakeConnection())
    assert not any(connection.closed for connection in busy)
    registry.remove(busy[0])
    assert registry.add(FakeConnection())


def test_one_address_may_not_take_all_and_loopback_may() -> None:
    registry = make(max_connections=100, max_connections_per_address=2)
    assert registry.add(FakeConnection())
    gone = FakeConnection()
    assert registry.add(gone)
    assert not registry.add(FakeConnection())
    assert registry.add(FakeConnection("10.0.0.2"))
    assert all(registry.add(FakeConnection("127.0.0.1")) for _ in range(5))
    registry.remove(gone)
    registry.remove(gone)
    assert registry.add(FakeConnection())


def test_incomplete_heads_are_bounded_together() -> None:
    registry = make()
    connections = [FakeConnection() for _ in range(4)]
    for connection in connections:
        registry.add(connection)
        registry.hold(MOST_HEAD_BYTES // 4)
    assert not any(connection.closed for connection in connections)
    registry.hold(1)
    assert connections[0].closed == "dropped"


def test_overdue_connections_are_expired_by_the_sweep() -> None:
    timers = Timers()
    registry = make(timers)
    early, late = FakeConnection(deadline=5.0), FakeConnection(deadline=50.0)
    registry.add(early)
    registry.add(late)
    timers.now = 6.0
    sweep = timers.callbacks[-1]
    assert callable(sweep)
    sweep()
    assert early.closed == "expired"
    assert not late.closed


def test_lag_is_how_late_the_timer_fires() -> None:
    async def main() -> list[float]:
        now, seen = [10.0], []
        lag = LoopLag(seen.append, interval=0.05, clock=lambda: now[0])
        lag.start()
        now[0] = 10.05 + 90.0
        lag.fired()
        now[0] += 0.05
        lag.fired()
        lag.stop()
        assert lag.worst == pytest.approx(90.0)
        return seen

    assert asyncio.run(main()) == pytest.approx([90.0, 0.0])


def test_descriptors_for_the_engine_are_left_free() -> None:
    """A connection whose descriptor is too high is closed, and somebody makes room."""

    async def main() -> tuple[int, int]:
        made, asked = [], []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            acceptor = Acceptor(
                listener,
                lambda: made.append(1) or asyncio.Protocol(),  # type: ignore[func-returns-value]
                most=3,  # standard input, output and error: any connection lies above
                make_room=lambda: asked.append(1) or True,  # type: ignore[func-returns-value]
            )
            reader, writer = await asyncio.open_connection(*address)
            assert await reader.read() == b""
            writer.close()
            acceptor.close()
            await acceptor.wait_closed()
        return len(made), len(asked)

    made, asked = asyncio.run(main())
    assert made == 0
    assert asked > 0


@pytest.mark.parametrize("field", ["max_head_bytes", "head_seconds", "max_connections"])
def test_limits_must_be_positive(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Limits(**{field: 0})
