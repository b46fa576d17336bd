"""Latencies of the last periods, by class."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.server.records.latencies import SLOTS, STEP, RecentLatencies, SlidingQuantiles


@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=50))
def test_quantiles_are_at_most_a_bucket_too_large(times: list[float]) -> None:
    quantiles = SlidingQuantiles()
    for time in times:
        quantiles.add(time)
    count, half, most = quantiles.summary()
    assert count == len(times)
    assert half is not None
    assert most is not None
    in_order = sorted(times)
    exact = in_order[(len(times) + 1) // 2 - 1]
    assert exact * 0.999 <= half <= exact * STEP * 1.001
    assert half <= most <= in_order[-1] * STEP * 1.001


@pytest.mark.parametrize("time", [0.0, -1.0, 1e-9, 1e9])
def test_impossible_times_count_as_the_nearest_possible(time: float) -> None:
    quantiles = SlidingQuantiles()
    quantiles.add(time)
    count, half, _ = quantiles.summary()
    assert count == 1
    assert half is not None
    assert 0 < half < 1e5


def test_times_are_forgotten_after_the_window() -> None:
    quantiles = SlidingQuantiles()
    quantiles.add(1.0)
    for _ in range(SLOTS - 1):
        quantiles.advance()
    assert quantiles.summary()[0] == 1
    quantiles.advance()
    assert quantiles.summary() == (0, None, None)


def test_classes_go_by_new_tokens_and_only_while_watched() -> None:
    latencies = RecentLatencies()
    latencies.boundary_tokens = 100
    latencies.first_token(1.0, 100)
    assert latencies.summary() == {}
    latencies.start()
    latencies.first_token(0.5, 100)
    latencies.first_token(2.0, 101)
    latencies.first_token(2.0, 101)
    latencies.next_tokens(0.01, 5)
    found = latencies.summary()
    assert found["short"]["ttft"][0] == 1
    assert found["long"]["ttft"][0] == 2
    assert found["short"]["itl"][0] == 1
    assert found["long"]["itl"] == (0, None, None)
    latencies.stop()
    assert latencies.summary() == {}
    latencies.start()
    assert latencies.summary()["long"]["ttft"][0] == 0
