"""The head-of-line formulas against a simulation of the queue that they describe."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf, sqrt
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.queueing import mean_wait, mixed_wait, mixing_penalty

BATCHES = 40
PER_BATCH = 4000


def simulate(rate: float, service: Callable[[random.Random], float]) -> tuple[float, float]:
    """Mean wait and its standard error, by the means of batches long enough to be independent.

    Lindley's recursion: the next one waits for what its predecessor waited and took, less the time
    between them.
    """
    draw = random.Random(1)
    wait, means = 0.0, []
    for batch in range(BATCHES + 1):
        waits = []
        for _ in range(PER_BATCH):
            waits.append(wait)
            wait = max(0.0, wait + service(draw) - draw.expovariate(rate))
        if batch:  # the first one fills the queue
            means.append(mean(waits))
    return mean(means), stdev(means) / sqrt(BATCHES)


def close(simulated: tuple[float, float], formula: float) -> bool:
    """Within four standard errors, and those small enough for that to mean something."""
    value, error = simulated
    assert error < 0.1 * value
    return abs(value - formula) < 4 * error


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_mean_wait_of_exponential_and_of_equal_services(load: float) -> None:
    assert close(simulate(load, lambda draw: draw.expovariate(1.0)), mean_wait(load, 1.0, 2.0))
    assert close(simulate(load, lambda draw: 1.0), mean_wait(load, 1.0, 1.0))


@pytest.mark.parametrize(("share", "short", "long"), [(0.9, 0.05, 1.0), (0.5, 0.2, 0.8)])
def test_mixed_classes(share: float, short: float, long: float) -> None:
    rate = 0.7 / (share * short + (1 - share) * long)

    def service(draw: random.Random) -> float:
        return short if draw.random() < share else long

    mixed = simulate(rate, service)
    assert close(mixed, mixed_wait(rate, share, short, long))
    equal, error = simulate(rate, lambda draw: share * short + (1 - share) * long)
    penalty = (mixed[0] - equal, sqrt(mixed[1] ** 2 + error**2))
    assert close(penalty, mixing_penalty(rate, share, short, long))


@given(
    share=st.floats(0, 1),
    short=st.floats(0.001, 1),
    long=st.floats(0.001, 10),
    load=st.floats(0.01, 0.99),
)
def test_the_penalty_is_what_mixing_adds(
    share: float, short: float, long: float, load: float
) -> None:
    service = share * short + (1 - share) * long
    rate = load / service
    alike = mean_wait(rate, service, service**2)
    penalty = mixing_penalty(rate, share, short, long)
    assert penalty >= 0
    assert mixed_wait(rate, share, short, long) == pytest.approx(alike + penalty)


def test_an_overloaded_queue_has_no_end() -> None:
    assert mean_wait(1.0, 1.0, 1.0) == inf
    assert mixed_wait(3.0, 0.5, 0.1, 1.0) == inf
    assert mixing_penalty(3.0, 0.5, 0.1, 1.0) == inf
    assert mixing_penalty(3.0, 0.5, 1.0, 1.0) == 0


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="mean_square_service"):
        mean_wait(1.0, 0.5, 0.1)
    with pytest.raises(ValueError, match="rate"):
        mean_wait(-1.0, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"short_share .* 1\.5"):
        mixing_penalty(1.0, 1.5, 0.1, 0.2)
    with pytest.raises(ValueError, match="negative"):
        mixing_penalty(1.0, 0.5, -0.1, 0.2)
    with pytest.raises(ValueError, match="negative"):
        mixed_wait(1.0, 0.5, -0.1, 0.9)
