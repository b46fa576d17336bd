from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.pools.rates import WorkRate


def feed(rate: WorkRate, start: float, length: float, jobs: int, seconds: float) -> float:
    """``jobs`` even arrivals in a period; the rate at its end."""
    for number in range(jobs):
        rate.add(seconds, start + length * number / jobs)
    return rate.close(start + length)


@given(st.floats(0.01, 10), st.integers(1, 200), st.floats(0.1, 10))
def test_a_constant_rate_is_known_after_one_period(seconds, jobs, length) -> None:
    rate = WorkRate(30.0)
    rate.close(0.0)
    for period in range(3):
        got = feed(rate, period * length, length, jobs, seconds)
        assert got == pytest.approx(jobs * seconds / length)


def test_the_past_fades_by_time_and_not_by_periods() -> None:
    """Ten periods of one second weigh as much as one of ten, within the noise limits."""
    fine, coarse = WorkRate(20.0), WorkRate(20.0)
    for rate in (fine, coarse):
        rate.close(0.0)
    for second in range(20):
        feed(fine, float(second), 1.0, 4, 0.5)
    for start in (0.0, 10.0):
        feed(coarse, start, 10.0, 40, 0.5)
    assert fine.rate == pytest.approx(coarse.rate)


def test_a_step_is_believed_after_one_period() -> None:
    rate = WorkRate(60.0)
    rate.close(0.0)
    for second in range(100):
        feed(rate, float(second), 1.0, 100, 0.01)
    assert feed(rate, 100.0, 1.0, 100, 0.06) == pytest.approx(6.0)
    assert feed(rate, 101.0, 1.0, 0, 0.0) == pytest.approx(0.0)


def test_a_few_large_jobs_more_are_believed_as_well() -> None:
    """Three a period become eighteen: certain, though eighteen jobs vary by a quarter."""
    rate = WorkRate(60.0)
    rate.close(0.0)
    for period in range(10):
        feed(rate, 2.0 * period, 2.0, 3, 0.14)
    assert feed(rate, 20.0, 2.0, 18, 0.14) == pytest.approx(1.26, rel=0.1)


def test_one_large_job_is_part_of_the_average() -> None:
    """It neither counts as a new rate nor makes the past forgotten."""
    rate = WorkRate(60.0)
    rate.close(0.0)
    for second in range(20):
        feed(rate, float(second), 1.0, 20, 0.01)
    rate.add(5.0, 20.1)
    assert feed(rate, 20.0, 1.0, 20, 0.01) == pytest.approx(0.2 + 5.0 / 18, abs=0.02)


def test_a_clump_is_not_taken_for_a_rate() -> None:
    rate = WorkRate(60.0)
    rate.close(0.0)
    for second in range(100):
        feed(rate, float(second), 1.0, 100, 0.01)
    for _ in range(1000):
        rate.add(0.1, 100.1)
    assert feed(rate, 100.0, 1.0, 100, 0.01) == pytest.approx(1.0)


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_chance_does_not_make_it_jump(seed: int) -> None:
    """Poisson arrivals of exponential sizes: the average stays near the truth."""
    draw = random.Random(seed)
    rate = WorkRate(60.0)
    rate.close(0.0)
    time, seen = draw.expovariate(5.0), []
    for second in range(1, 301):
        while time < second:
            rate.add(draw.expovariate(2.0), time)
            time += draw.expovariate(5.0)
        seen.append(rate.close(float(second)))
    late = seen[60:]
    assert sum(abs(value - 2.5) < 1.25 for value in late) > 0.9 * len(late)


def test_an_empty_period_has_no_end() -> None:
    rate = WorkRate(10.0)
    rate.add(3.0, 5.0)
    assert rate.close(5.0) == 0.0
    assert rate.close(6.0) == pytest.approx(3.0)
    assert rate.close(6.0) == pytest.approx(3.0)


@pytest.mark.parametrize("seconds", [-1.0, float("inf"), float("nan")])
def test_a_job_has_a_size(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        WorkRate(1.0).add(seconds, 0.0)


@pytest.mark.parametrize("memory", [0.0, -1.0, float("inf")])
def test_memory_is_positive(memory: float) -> None:
    with pytest.raises(ValueError, match="memory_seconds"):
        WorkRate(memory)
