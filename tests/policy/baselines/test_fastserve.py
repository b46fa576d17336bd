"""Levels are skipped, used up and left by starvation."""

from __future__ import annotations

import pytest

from pla_serve.policy.baselines.fastserve import FeedbackOptions, FeedbackQueue
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.pending import Pending
from pla_serve.policy.protocol import Batch, BatchClass, Chunk
from tests.policy.baselines.helpers import add, make, run, shape, step

OPTIONS = FeedbackOptions(levels=4, quantum_seconds=0.1, ratio=2.0, starve_seconds=5.0)
SPEC = "fastserve:levels=4:quantum_seconds=0.1:ratio=2:starve_seconds=5"
CONFIG = PolicyConfig(max_batch_tokens=200)


def pending(name: str, seconds: float, arrival: float = 0.0) -> Pending:
    return Pending(name, arrival, None, 0, 0, 100, 0, True, seconds, None)


@pytest.mark.parametrize(
    ("seconds", "level"), [(0.01, 0), (0.1, 0), (0.11, 1), (0.2, 1), (0.4, 2), (0.41, 3), (99, 3)]
)
def test_joins_the_first_level_whose_quantum_covers_it(seconds: float, level: int) -> None:
    queue = FeedbackQueue(OPTIONS)
    queue.push(pending("a", seconds))
    assert queue.level("a") == level


def test_a_newcomer_in_a_lower_level_passes_between_batches() -> None:
    policy = make(SPEC, CONFIG)
    add(policy, "long", 1000)
    assert step(policy, 0.2, 0.2) == [("long", 200)]
    add(policy, "short", 50, 0.2)
    assert step(policy, 0.4, 0.2) == [("short", 50), ("long", 150)]


def test_a_used_up_quantum_demotes_behind_those_of_the_next_level() -> None:
    """Time in a shared batch counts in full for everyone in it."""
    policy = make(SPEC, PolicyConfig(max_batch_tokens=200, long_chunk_tokens=100))
    add(policy, "first", 190)
    add(policy, "second", 200, 0.01)
    assert step(policy, 0.2, 0.2) == [("first", 100), ("second", 100)], "both go to level 2"
    add(policy, "third", 150, 0.2)  # level 1
    assert shape(run(policy, 0.3)) == [("third", 100), ("first", 90), ("second", 10)]


def test_less_than_a_quantum_does_not_demote() -> None:
    queue = FeedbackQueue(OPTIONS)
    request = pending("a", 0.2)
    queue.push(request)
    part = Batch(BatchClass.SHORT, (Chunk("a", 10, 0, completes=False),))
    for seconds, level in [(0.15, 1), (0.06, 2), (0.39, 2), (0.02, 3), (1e6, 3)]:
        next(queue.drain(0.0))
        queue.charge(part, seconds, 1.0)
        queue.push(request)
        assert queue.level("a") == level


def test_who_starves_moves_to_the_first_level() -> None:
    policy = make(SPEC, CONFIG)
    add(policy, "long", 1000, 0.0)
    for number in range(100):
        add(policy, f"s{number}", 200, 0.1)  # level 1, each fills a batch
    served = [step(policy, 0.1 + 0.2 * n, 0.2)[0][0] for n in range(1, 30)]
    turn = served.index("long")
    assert 0.1 + 0.2 * turn == pytest.approx(5.0, abs=0.21)
    assert served.count("long") == 1, "one batch uses up the first quantum"


def test_numbers_that_change_give_a_new_place_and_an_end_leaves_none() -> None:
    queue = FeedbackQueue(OPTIONS)
    first = pending("a", 1.0)
    queue.push(first)
    queue.discard(first)
    queue.discard(first)
    queue.push(pending("a", 0.05))
    assert queue.level("a") == 0
    assert [r.id for r in queue.drain(0.0)] == ["a"]
    queue.charge(Batch(BatchClass.SHORT, (Chunk("a", 100, 0),)), 0.05, 1.0)
    assert queue.level("a") is None
    assert len(queue) == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("levels", 0), ("ratio", 0.5), ("quantum_seconds", 0.0), ("starve_seconds", -1.0)],
)
def test_options_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        FeedbackOptions(**{field: value})  # type: ignore[arg-type]
