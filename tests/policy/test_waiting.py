"""Waiting pays or does not happen: plans against all rules there are, and a simulated queue."""

from collections.abc import Callable
from itertools import product
from math import exp, factorial, inf

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pla_serve.policy.waiting import (
    LEAST_GAIN,
    LIGHT_LOAD,
    NEVER,
    ArrivalRate,
    GainWindow,
    WaitOptions,
    _solve,
    linear_curve,
    plan_waits,
)


def subadditive(steps: list[float]) -> tuple[float, ...]:
    """Seconds that never fall, and never exceed those of the requests one by one."""
    return tuple(min(s, (n + 1) * min(steps)) for n, s in enumerate(sorted(steps)))


curves = st.lists(st.floats(1e-3, 0.1), min_size=2, max_size=5).map(subadditive)
deep_curves = st.lists(st.floats(1e-3, 0.1), min_size=2, max_size=32).map(subadditive)


def average_cost(
    curve: tuple[float, ...], rate: float, others: float, idle: float, waits: tuple[bool, ...]
) -> float:
    """Request-seconds a second of one rule, from the stationary distribution of its decisions."""
    size = len(curve) + 1
    moves, costs, times = np.zeros((size, size)), np.zeros(size), np.zeros(size)
    for n in range(size):
        if n == 0 or waits[n - 1]:
            moves[n, n + 1] = 1
            times[n] = 1 / rate
            costs[n] = (n + idle * (n > 0)) / rate
            continue
        service = curve[n - 1]
        for k in range(size - 1):
            moves[n, k] = exp(-rate * service) * (rate * service) ** k / factorial(k)
        moves[n, -1] = 1 - moves[n].sum()
        times[n] = service
        costs[n] = (n + others) * service + rate * service**2 / 2
    balance = np.vstack([moves.T - np.eye(size), np.ones(size)])
    share = np.linalg.lstsq(balance, np.append(np.zeros(size), 1.0), rcond=None)[0]
    return float(share @ costs / (share @ times))


@settings(max_examples=80, deadline=None)
@given(curves, st.floats(1, 300), st.integers(0, 20), st.integers(0, 2))
def test_no_rule_is_better_than_the_plan(
    curve: tuple[float, ...], rate: float, others: int, idle: int
) -> None:
    assume(rate * curve[-1] < len(curve))
    plan = plan_waits(curve, rate, others, idle)
    rules = [(*head, False) for head in product([False, True], repeat=len(curve) - 1)]
    best = min(average_cost(curve, rate, others, idle, rule) for rule in rules)
    never = average_cost(curve, rate, others, idle, (False,) * len(curve))
    if plan is NEVER:
        assert best >= (1 - LEAST_GAIN) * never - 1e-6
    else:
        chosen = average_cost(curve, rate, others, idle, plan.waits)
        assert chosen == pytest.approx(best, rel=1e-5)
        assert plan.gain == pytest.approx(1 - chosen / never, rel=1e-3)
        assert plan.gain >= LEAST_GAIN


@settings(max_examples=150, deadline=None)
@given(
    deep_curves,
    st.floats(0.01, 1),
    st.integers(0, 60),
    st.integers(0, 3),
)
def test_at_light_load_no_plan_waits_also_without_the_shortcut(
    curve: tuple[float, ...], share: float, others: int, idle: int
) -> None:
    """Were it otherwise, the shortcut would change decisions, and not only skip work."""
    rate = share * 0.999 * LIGHT_LOAD / (curve[0] * (1 + others))
    assert plan_waits(curve, rate, others, idle) is NEVER
    assert not _solve(curve, rate, others, idle).waits_at(1)


def test_depths_that_cost_more_than_one_by_one_are_not_aimed_at() -> None:
    cliff = (0.01, 0.011, 0.012, 0.5, 0.5, 0.5)
    assert plan_waits(cliff, 90, 20) == plan_waits(cliff[:3], 90, 20)
    assert plan_waits(cliff, 90, 20) is not NEVER


def test_more_arrivals_than_it_can_keep_up_with_need_no_wait() -> None:
    assert plan_waits((0.01, 0.011, 0.012), 260, 20) is NEVER


def test_nobody_else_waits_so_no_wait_pays() -> None:
    """With linear cost and no one behind the shorts, going at once is all but optimal always."""
    for load in (0.3, 1.0, 3.0, 10.0):
        assert plan_waits(linear_curve(0.03, 0.002), load / 0.03) is NEVER


def test_the_more_others_wait_the_longer_a_batch_is_held() -> None:
    depths = [plan_waits(linear_curve(0.03, 0.002), 20, m).target(1) for m in (0, 2, 8, 32)]
    assert depths == sorted(depths)
    assert depths[0] == 1
    assert depths[-1] > 2


def test_who_could_use_the_device_meanwhile_shortens_it() -> None:
    curve = linear_curve(0.03, 0.002)
    assert plan_waits(curve, 20, 8).target(1) > plan_waits(curve, 20, 8, idle=8).target(1)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="positive and finite time"):
        plan_waits((0.0, 1.0), 1)
    with pytest.raises(ValueError, match="rate, others and idle"):
        plan_waits((1.0, 1.0), inf)
    with pytest.raises(ValueError, match="memory"):
        ArrivalRate(0)
    with pytest.raises(ValueError, match="longest_wait"):
        WaitOptions(longest_wait=-1)


@given(st.lists(st.floats(0, 30), min_size=8, max_size=40).map(sorted), st.floats(0, 20))
def test_the_rate_is_a_decayed_count(times: list[float], later: float) -> None:
    estimator = ArrivalRate(memory=4.0)
    for time in times:
        estimator.arrived(time)
    now = times[-1] + later
    if now == times[0]:
        assert estimator.rate(now) == 0
        return
    weights = sum(exp((time - now) / 4) for time in times[1:])
    span = 4 * (1 - exp((times[0] - now) / 4))
    if span > 1e-6:
        assert estimator.rate(now) == pytest.approx(weights / span, rel=1e-6)


def test_the_rate_is_unbiased_falls_in_silence_and_needs_evidence() -> None:
    random = np.random.default_rng(0)
    for rate in (0.5, 20.0):
        times = np.cumsum(random.exponential(1 / rate, 4000))
        estimator = ArrivalRate()
        seen = []
        for time in times.tolist():
            seen.append(estimator.rate(time))
            estimator.arrived(time)
        assert np.mean(seen[50:]) == pytest.approx(rate, rel=0.1)
        assert estimator.rate(times[-1] + 50) < 0.01 * rate
    two = ArrivalRate()
    two.arrived(1.0)
    two.arrived(1.001)
    assert two.rate(1.001) == 0


def busy_window(options: WaitOptions | None = None) -> GainWindow:
    """After 20 arrivals a second for 10 seconds, the last one at 10.0."""
    window = GainWindow(options)
    for step in range(201):
        window.arrived(step / 20)
    return window


CURVE = linear_curve(0.03, 0.002)


@given(
    st.integers(1, 12),
    st.floats(0, 0.2),
    st.floats(-0.1, 1),
    st.integers(0, 50),
    st.floats(0, 0.2),
)
def test_a_wait_is_bounded(
    pending: int, waited: float, due: float, others: int, longest: float
) -> None:
    options = WaitOptions(longest_wait=longest, margin=0.01)
    window = busy_window(options)
    window.plan(CURVE, 10.0, others)
    window.prepare()
    until = window.until(10.0, pending, 10.0 - waited, CURVE, due=10.0 + due, others=others)
    if until is not None:
        assert 10.0 < until <= 10.0 - waited + longest
        assert until + CURVE[pending - 1] + 0.01 <= 10.0 + due + 1e-9
        assert window.plan(CURVE, 10.0, others).waits_at(pending)


def test_it_waits_for_others_and_gives_up_in_silence() -> None:
    window = busy_window(WaitOptions(longest_wait=100.0))
    assert window.until(10.0, 1, 10.0, CURVE) is None
    assert window.until(10.0, 1, 10.0, CURVE, others=16) is None, "a decision solves no plan"
    window.prepare()
    until = window.until(10.0, 1, 10.0, CURVE, others=16)
    assert until is not None
    depth = window.plan(CURVE, 10.0, 16).target(1)
    assert until == pytest.approx(10.0 + (depth - 1) / window.rate(10.0))
    assert window.until(40.0, 1, 10.0, CURVE, others=16) is None


Hold = Callable[[float, int, float], float | None]


def simulate(
    arrivals: list[float], curve: tuple[float, ...], hold: Hold, others: int = 0
) -> tuple[float, float]:
    """A server of batches: mean latency, and request-seconds a request with those of others."""
    now, at, busy = 0.0, 0, 0.0
    queue: list[float] = []
    latencies: list[float] = []
    while at < len(arrivals) or queue:
        while at < len(arrivals) and arrivals[at] <= now:
            queue.append(arrivals[at])
            at += 1
        following = arrivals[at] if at < len(arrivals) else inf
        if not queue:
            now = following
            continue
        until = hold(now, len(queue), queue[0])
        if until is not None and until > now:
            now = min(until, following)
            continue
        batch, queue = queue[: len(curve)], queue[len(curve) :]
        now += curve[len(batch) - 1]
        busy += curve[len(batch) - 1]
        latencies += [now - arrival for arrival in batch]
    mean = float(np.mean(latencies))
    return mean, mean + others * busy / len(arrivals)


def gain_based(arrivals: list[float], curve: tuple[float, ...], others: int = 0) -> Hold:
    window = GainWindow()
    told = iter([*arrivals, inf])
    upcoming = [next(told)]

    def hold(now: float, pending: int, oldest: float) -> float | None:
        while upcoming[0] <= now:
            window.arrived(upcoming[0])
            upcoming[0] = next(told)
        window.plan(curve, now, others)
        window.prepare()
        return window.until(now, pending, oldest, curve, others=others)

    return hold


def at_once(now: float, pending: int, oldest: float) -> float | None:
    return None


def fixed(now: float, pending: int, oldest: float) -> float | None:
    return None if pending >= 16 else oldest + 0.007


LAUNCH = 0.01


def poisson(load: float, count: int, seed: int) -> list[float]:
    return np.cumsum(np.random.default_rng(seed).exponential(LAUNCH / load, count)).tolist()


@pytest.mark.parametrize("load", [0.02, 0.1, 0.5, 2.0, 6.0])
def test_gain_based_waiting_never_loses_to_none(load: float) -> None:
    arrivals, curve = poisson(load, 6000, 1), linear_curve(LAUNCH, LAUNCH / 10)
    none, _ = simulate(arrivals, curve, at_once)
    ours, _ = simulate(arrivals, curve, gain_based(arrivals, curve))
    assert ours <= 1.01 * none


@pytest.mark.parametrize("load", [0.02, 0.1, 0.5, 2.0, 6.0])
def test_nor_does_it_where_longs_are_interrupted_and_it_gains_there(load: float) -> None:
    arrivals, curve = poisson(load, 6000, 2), linear_curve(LAUNCH, LAUNCH / 10)
    _, none = simulate(arrivals, curve, at_once, 8)
    _, ours = simulate(arrivals, curve, gain_based(arrivals, curve, 8), 8)
    assert ours <= 1.01 * none
    if load == 0.5:
        assert ours < 0.9 * none


def test_a_fixed_window_loses_at_light_load() -> None:
    arrivals, curve = poisson(0.02, 4000, 3), linear_curve(LAUNCH, LAUNCH / 10)
    none, _ = simulate(arrivals, curve, at_once)
    window, _ = simulate(arrivals, curve, fixed)
    ours, _ = simulate(arrivals, curve, gain_based(arrivals, curve))
    assert window > 1.5 * none
    assert ours == none
