"""The channel between the two processes, from the child's side."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path

import msgspec
import pytest
import zmq

from pla_serve.engine.config import EngineConfig
from pla_serve.engine.host.process import MOST_AT_ONCE, Channel, Launch
from pla_serve.wire.engine import AbortRequest, Shutdown

Pair = tuple[Channel, "zmq.Socket[bytes]"]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """The child's channel, and the parent's socket to it."""
    inbound = f"ipc://{tmp_path}/in"
    launch = Launch(config=EngineConfig(), inbound=inbound, outbound=f"ipc://{tmp_path}/out")
    channel = Channel(launch)
    with zmq.Context() as context, context.socket(zmq.PUSH) as parent:
        parent.connect(inbound)
        yield channel, parent
        parent.close(linger=0)
    channel.close()


def test_a_flood_comes_in_portions_and_in_order(pair: Pair) -> None:
    channel, parent = pair
    sent = [str(number) for number in range(3 * MOST_AT_ONCE)]
    for name in sent:
        parent.send(msgspec.msgpack.encode(AbortRequest(name)))
    parent.send(msgspec.msgpack.encode(Shutdown()))
    arrived: list[str] = []
    while not channel.closing:
        channel.wait(None)
        portion = [message.id for message in channel.inbox()]
        assert len(portion) <= MOST_AT_ONCE
        arrived += portion
    assert arrived == sent


def test_a_pause_without_end_ends_with_a_message(pair: Pair) -> None:
    channel, parent = pair
    parent.send(msgspec.msgpack.encode(AbortRequest("x")))
    channel.wait(inf)
    assert [message.id for message in channel.inbox()] == ["x"]
