"""When processes are started again, and when they count as hung."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pla_serve.fleet.supervisor.restarts import HangDetector, Restarts
from pla_serve.fleet.supervisor.spec import Health

HEALTH = Health(base_seconds=1.0, most_seconds=8.0, steady_seconds=60.0)


def test_first_end_is_repaired_at_once_and_further_ones_wait_longer() -> None:
    restarts, now, waits = Restarts(HEALTH), 0.0, []
    for _ in range(7):
        restarts.started(now)
        due = restarts.ended(now + 1)
        waits.append(due - now - 1)
        now = due
    assert waits == [0, 1, 2, 4, 8, 8, 8]
    assert restarts.count == 7


def test_a_long_life_is_a_new_beginning() -> None:
    restarts = Restarts(HEALTH)
    for _ in range(5):
        restarts.started(0.0)
        restarts.ended(1.0)
    restarts.started(100.0)
    assert restarts.ended(160.0) == 160.0
    restarts.started(160.0)
    assert restarts.ended(161.0) == 162.0


@given(st.lists(st.floats(0, 1000), max_size=3000))
def test_no_wait_is_longer_than_the_longest(lives: list[float]) -> None:
    restarts, now = Restarts(HEALTH), 0.0
    for life in lives:
        restarts.started(now)
        now += life
        due = restarts.ended(now)
        assert now <= due <= now + HEALTH.most_seconds + 1e-6
        now = due


def test_silence_is_patient_before_the_first_answer() -> None:
    silence = HangDetector(Health(hang_seconds=5, start_seconds=100), 10.0)
    assert not silence.hangs(109.0)
    assert silence.hangs(110.0)
    silence.answered(50.0)
    assert not silence.hangs(54.9)
    assert silence.hangs(55.0)
