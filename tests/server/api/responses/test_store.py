"""The store of answers by itself."""

from __future__ import annotations

from random import Random

from pla_serve.server.api.responses.store import (
    ENTRY_BYTES,
    ResponseStore,
    StoredAnswer,
    Turn,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def answer(size: int = 10, before: Turn | None = None) -> StoredAnswer:
    return StoredAnswer(b"a" * size, Turn(before, b"t" * size), 1, False, True)


def store(most: int = 100, size: int = 10**6, clock: Clock | None = None) -> ResponseStore:
    return ResponseStore(most, size, 10.0, clock or Clock())


def test_answers_belong_to_their_tenant() -> None:
    kept = store()
    assert kept.put("a", "1", answer())
    assert kept.get("a", "1") is not None
    assert kept.get("b", "1") is None
    assert not kept.delete("b", "1")
    assert kept.delete("a", "1")
    assert len(kept) == kept.bytes == 0


def test_an_answer_expires_after_its_last_use() -> None:
    clock = Clock()
    kept = store(clock=clock)
    kept.put("a", "1", answer())
    kept.put("a", "2", answer())
    clock.now = 9.0
    assert kept.get("a", "1") is not None
    clock.now = 11.0
    assert kept.get("a", "2") is None
    assert kept.get("a", "1") is not None
    clock.now = 30.0
    assert kept.get("a", "1") is None
    assert kept.bytes == 0


def test_who_has_most_loses_first() -> None:
    kept = store(most=4)
    kept.put("b", "b", answer())
    for name in "1234":
        kept.put("a", name, answer())
    assert kept.get("b", "b") is not None
    assert kept.get("a", "1") is None
    assert kept.get("a", "4") is not None
    kept = store(size=4 * (ENTRY_BYTES + 200))
    kept.put("b", "b", answer(100))
    for name in "1234":
        assert kept.put("a", name, answer(150))
    assert kept.get("b", "b") is not None
    assert kept.get("a", "1") is None


def test_what_is_too_large_is_not_kept_and_drives_nobody_out() -> None:
    kept = store(size=5_000)
    kept.put("a", "1", answer())
    assert not kept.put("a", "2", answer(3_000))
    assert kept.get("a", "1") is not None


def test_a_conversation_is_counted_once_and_lives_with_its_last_answer() -> None:
    kept, turn = store(), None
    for place in range(5):
        entry = answer(100, turn)
        kept.put("a", str(place), entry)
        turn = entry.turn
    assert kept.bytes == 5 * (ENTRY_BYTES + 200)
    for place in range(4):
        kept.delete("a", str(place))
    assert kept.bytes == ENTRY_BYTES + 100 + 5 * 100
    last = kept.get("a", "4")
    assert last is not None
    assert last.turn.conversation() == [b"t" * 100] * 5
    kept.delete("a", "4")
    assert kept.bytes == 0


def test_bounds_hold_for_any_order_of_use() -> None:
    rng, clock = Random(3), Clock()
    kept = ResponseStore(20, 40_000, 10.0, clock)
    turns: dict[str, list[Turn | None]] = {tenant: [None] for tenant in "abc"}
    for step in range(2_000):
        clock.now += rng.random() * 0.3
        tenant, id = rng.choice("abc"), str(rng.randrange(60))
        if rng.random() < 0.6:
            entry = answer(rng.randrange(3_000), rng.choice(turns[tenant][-20:]))
            if kept.put(tenant, f"{id}-{step}", entry):
                turns[tenant].append(entry.turn)
        elif rng.random() < 0.5:
            kept.get(tenant, id)
        else:
            kept.delete(tenant, id)
        assert len(kept) <= 20
        assert 0 <= kept.bytes <= 40_000
    clock.now += 100
    assert kept.get("a", "x") is None
    assert len(kept) == kept.bytes == 0
