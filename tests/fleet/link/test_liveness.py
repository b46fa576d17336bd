"""Silence, backoff and frames, on clocks and loops of the tests' own."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.fleet.link.liveness import Backoff, PeerSilence
from pla_serve.wire.frames import FRAME_BYTES, Outbox, Overflow


@given(st.lists(st.floats(0.01, 0.25), min_size=1, max_size=200))
def test_a_peer_is_lost_after_its_seconds_and_not_before(steps: list[float]) -> None:
    silence = PeerSilence(2.0, 0.0)
    now = 0.0
    for step in steps:
        now += step
        assert silence.tick(now) == (now > 2.0 + 1e-9) or abs(now - 2.0) < 1e-6


def test_a_word_begins_the_count_anew() -> None:
    silence = PeerSilence(2.0, 0.0)
    ticks = [0.25 * index for index in range(1, 9)]
    assert not any(silence.tick(now) for now in ticks)
    silence.heard()
    assert not any(silence.tick(2.0 + now) for now in ticks)
    assert silence.tick(4.25)


def test_time_in_which_this_process_stood_still_is_not_silence() -> None:
    silence = PeerSilence(2.0, 0.0)
    silence.tick(0.25)
    assert not silence.tick(1000.0)
    silence.heard()
    assert not silence.tick(1000.25)


def test_but_a_peer_that_stays_silent_after_it_is_lost() -> None:
    silence = PeerSilence(2.0, 0.0)
    silence.tick(1000.0)
    now, ticks = 1000.0, 0
    while not silence.tick(now):
        now, ticks = now + 0.25, ticks + 1
    assert ticks <= 8


def test_backoff_doubles_to_its_bound() -> None:
    backoff = Backoff(0.1, 2.0)
    assert [backoff.delay(n) for n in (1, 2, 3)] == pytest.approx([0.1, 0.2, 0.4])
    assert backoff.delay(6) == backoff.delay(10_000) == 2.0
    with pytest.raises(ValueError, match="0 < base <= most"):
        Backoff(3.0, 2.0)
    with pytest.raises(ValueError, match="must be positive"):
        PeerSilence(0.0, 0.0)


@given(st.lists(st.integers(0, 400), max_size=70))
def test_frames_are_what_was_put_in_order(sizes: list[int]) -> None:
    async def main() -> list[bytes]:
        outbox = Outbox(1 << 20)
        for size in sizes:
            outbox.put(bytes(size))
        return msgspec.msgpack.decode(await outbox.take()) if sizes else []

    assert asyncio.run(main()) == [bytes(size) for size in sizes]


@pytest.mark.parametrize("count", [15, 16, 65535, 65536])
def test_arrays_of_all_sizes(count: int) -> None:
    async def main() -> None:
        outbox = Outbox(1 << 20)
        for index in range(count):
            outbox.put(index % 100)
        frame = await outbox.take()
        assert msgspec.msgpack.decode(frame) == [index % 100 for index in range(count)]

    asyncio.run(main())


def test_a_frame_that_is_long_takes_no_more_in() -> None:
    async def main() -> None:
        outbox = Outbox(1 << 30)
        for _ in range(3):
            outbox.put(bytes(FRAME_BYTES))
        taken = [len(msgspec.msgpack.decode(await outbox.take())) for _ in range(3)]
        assert taken == [1, 1, 1]

    asyncio.run(main())


def test_what_is_not_read_is_bounded_and_room_comes_back() -> None:
    async def main() -> None:
        outbox = Outbox(100)
        outbox.put(bytes(1000))  # alone: it could never be sent otherwise
        with pytest.raises(Overflow, match="more than 100 bytes"):
            outbox.put(1)
        await outbox.take()
        outbox.put(1)
        assert msgspec.msgpack.decode(await outbox.take()) == [1]

    asyncio.run(main())


def test_who_waits_for_a_frame_gets_what_one_turn_of_the_loop_made() -> None:
    async def main() -> None:
        outbox = Outbox(1 << 20)
        waiting = asyncio.ensure_future(outbox.take())
        await asyncio.sleep(0)
        for index in range(5):
            outbox.put(index)
        assert msgspec.msgpack.decode(await waiting) == [0, 1, 2, 3, 4]

    asyncio.run(main())
