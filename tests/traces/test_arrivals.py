from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.traces.arrivals import Bursts, poisson


@given(st.integers(1, 60), st.floats(0.1, 100), st.integers(1, 7), st.integers(0, 99))
def test_bursts(count: int, rate: float, burst: int, seed: int) -> None:
    times = poisson(count, rate, burst, random.Random(seed))
    assert len(times) == count
    assert times == sorted(times)
    assert times[0] == 0
    sizes = [times.count(time) for time in dict.fromkeys(times)]
    assert all(size == burst for size in sizes[:-1])
    assert sizes[-1] <= burst


def test_arrivals_are_poisson() -> None:
    gaps = np.array([b - a for a, b in pairwise(poisson(5000, 3.0, 1, random.Random(1)))])
    assert gaps.mean() == pytest.approx(1 / 3, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.06)


def test_bursty_arrivals_keep_the_rate_and_come_in_bursts() -> None:
    process = Bursts(factor=10, quiet_seconds=90, burst_seconds=10)
    times = np.array(process.times(40_000, 5.0, random.Random(3)))
    assert np.all(np.diff(times) > 0)
    assert len(times) / times[-1] == pytest.approx(5.0, rel=0.1)
    seconds = np.bincount(times.astype(int))
    assert seconds.var() / seconds.mean() > 5  # 1 for Poisson
    # Quiet: 5 * 100 / (90 + 10 * 10) = 2.6 a second, 26 in a burst; so half comes in a tenth.
    assert np.median(seconds) == pytest.approx(2.6, abs=0.7)
    assert np.sort(seconds)[-len(seconds) // 10 :].mean() == pytest.approx(26, rel=0.15)


def test_a_factor_of_one_is_poisson() -> None:
    gaps = np.diff(Bursts(factor=1).times(5000, 3.0, random.Random(1)))
    assert gaps.mean() == pytest.approx(1 / 3, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.06)


@pytest.mark.parametrize("field", ["factor", "quiet_seconds", "burst_seconds"])
def test_out_of_range(field: str) -> None:
    with pytest.raises(ValueError, match="positive"):
        Bursts(**{field: 0.0})
