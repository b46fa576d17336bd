"""The published model: L_m is the root, and the fit finds what times can tell."""

from math import inf, isfinite

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pla_serve.policy.boundary import crossing
from pla_serve.policy.published.latency import LatencyModel, fit_latency

TRUE = LatencyModel(alpha=4e-8, beta=2e-5, gamma_w=3e-5, gamma_r=3e-5)

unit = st.floats(1e-12, 1e-3)
models = st.builds(LatencyModel, alpha=unit, beta=unit, gamma_w=unit, gamma_r=unit)


def test_seconds_are_the_published_formula() -> None:
    model = LatencyModel(alpha=2, beta=3, gamma_w=5, gamma_r=7)
    assert model.compute_seconds(10, 100) == 2 * 10 * (10 + 200) + 3 * 10
    assert model.memory_seconds(10, 100) == 5 * 10 + 7 * 100
    assert model.seconds(10, 100) == 4230 + 750


@given(models, st.integers(0, 10_000_000))
def test_the_boundary_is_where_the_parts_are_equal(model: LatencyModel, history: int) -> None:
    boundary = model.boundary(history)
    compute = model.compute_seconds(boundary, history)
    memory = model.memory_seconds(boundary, history)
    if boundary > 0:
        assert compute == pytest.approx(memory, rel=1e-6)
    else:
        assert history == 0
        assert model.gamma_w <= model.beta


@given(
    st.integers(1, 40),
    st.integers(0, 4000),
    st.integers(0, 4000),
    st.integers(0, 4000),
    st.integers(0, 500),
)
def test_the_boundary_is_what_a_scan_finds(a: int, b: int, w: int, r: int, history: int) -> None:
    """Integers, so that the scan is exact: the last L at which memory takes no less."""
    model = LatencyModel(alpha=a, beta=b, gamma_w=w, gamma_r=r)
    lengths = np.arange(10_000)
    below = lengths * (a * (lengths + 2 * history) + b) <= w * lengths + r * history
    assert int(model.boundary(history) + 1e-6) == lengths[below][-1]


@given(models, st.lists(st.integers(0, 10_000_000), min_size=2, max_size=2).map(sorted))
def test_the_boundary_moves_with_history_towards_its_limit(
    model: LatencyModel, histories: list[int]
) -> None:
    near, far = (model.boundary(history) for history in histories)
    slack = 1e-6 * max(near, far)
    if model.boundary(0) <= model.limit:
        assert near <= far + slack
        assert far <= model.limit * (1 + 1e-6)
    else:
        assert far <= near + slack
        assert far >= model.limit * (1 - 1e-6)


def test_the_limit_is_reached() -> None:
    assert TRUE.limit == pytest.approx(375)
    assert TRUE.boundary(10**12) == pytest.approx(375)
    assert TRUE.boundary(0) == pytest.approx(250)


@given(models, st.integers(0, 10_000_000))
def test_it_is_the_crossing_with_the_weights_read_per_token(
    model: LatencyModel, history: int
) -> None:
    per_token = model.beta - model.gamma_w + model.gamma_r
    assume(abs(per_token - model.gamma_r) > 1e-6 * model.gamma_r)
    expected = crossing(history, per_token, 2 * model.alpha, model.gamma_r, 0)
    assert model.boundary(history) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_degenerate_models() -> None:
    assert LatencyModel(1, 2, 2, 0).boundary(0) == 0
    assert LatencyModel(0, 1, 2, 0).boundary(0) == inf
    assert LatencyModel(0, 2, 2, 0).boundary(0) == 0
    assert LatencyModel(0, 2, 2, 1).boundary(5) == inf
    assert LatencyModel(0, 3, 2, 1).boundary(5) == 5
    assert LatencyModel(1, 0, 10, 0).boundary(2) == 6
    assert LatencyModel(1, 0, 10, 0).boundary(5) == 0
    assert LatencyModel(0, 0, 0, 1).limit == inf


@given(st.floats(1e-300, 1e-6), st.floats(0, 1e9), st.floats(0, 1e-3))
def test_extremes_neither_overflow_nor_turn_negative(
    alpha: float, history: float, gamma: float
) -> None:
    boundary = LatencyModel(alpha, 1e-5, gamma, gamma).boundary(history)
    assert boundary >= 0
    assert boundary == boundary  # not a NaN


def test_a_root_that_cancels_keeps_its_digits() -> None:
    """b is 1e6 times the root: the textbook form of it would lose half of the digits."""
    model = LatencyModel(alpha=1e-3, beta=1.0, gamma_w=0.0, gamma_r=1e-9)
    history = 1.0
    exact = 1e-9 / 1.002  # to first order
    assert model.boundary(history) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("value", [-1.0, inf, float("nan")])
def test_a_bad_coefficient_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="gamma_w must be a finite number"):
        LatencyModel(1, 1, value, 1)


def samples(count: int, noise: float, seed: int) -> list[tuple[float, float, float]]:
    random = np.random.default_rng(seed)
    new = random.integers(1, 4096, count)
    history = random.integers(0, 32_768, count) * random.integers(0, 2, count)
    factors = random.lognormal(0, noise, count)
    return [
        (float(x), float(h), TRUE.seconds(float(x), float(h)) * float(f))
        for x, h, f in zip(new, history, factors, strict=True)
    ]


FAR = LatencyModel(alpha=4e-7, beta=2e-6, gamma_w=2e-6, gamma_r=3e-7)


def test_the_fit_recovers_the_model_from_a_far_start() -> None:
    fitted = fit_latency(samples(200, 0.0, 1), FAR, beta=TRUE.beta)
    for name in LatencyModel.__slots__:
        assert getattr(fitted, name) == pytest.approx(getattr(TRUE, name), rel=0.01)
    assert fitted.boundary(4096) == pytest.approx(TRUE.boundary(4096), rel=0.02)


def test_outliers_have_little_say() -> None:
    clean = samples(300, 0.03, 2)
    spoilt = [(x, h, t * (8 if i % 6 == 0 else 1)) for i, (x, h, t) in enumerate(clean)]
    fitted = fit_latency(spoilt, FAR, gamma_w=TRUE.gamma_w)
    probes = [(64, 0), (2048, 0), (64, 8192), (4096, 16_384)]
    for probe in probes:
        assert fitted.seconds(*probe) == pytest.approx(TRUE.seconds(*probe), rel=0.1)


def test_times_decide_the_sum_and_the_known_part_splits_it() -> None:
    data = samples(200, 0.0, 3)
    by_beta = fit_latency(data, FAR, beta=1e-5)
    by_gamma = fit_latency(data, FAR, gamma_w=1e-5)
    by_start = fit_latency(data, FAR)
    whole = TRUE.beta + TRUE.gamma_w
    assert by_beta.beta == 1e-5
    assert by_gamma.gamma_w == pytest.approx(1e-5)
    assert by_start.beta == by_start.gamma_w
    for fitted in (by_beta, by_gamma, by_start):
        assert fitted.beta + fitted.gamma_w == pytest.approx(whole, rel=0.01)


def test_a_known_part_larger_than_the_sum_is_capped() -> None:
    fitted = fit_latency(samples(50, 0.0, 4), FAR, beta=1.0)
    assert fitted.gamma_w == 0
    assert fitted.beta == pytest.approx(TRUE.beta + TRUE.gamma_w, rel=0.01)


def test_samples_that_say_nothing_leave_the_start() -> None:
    useless = [(0.0, 5.0, 1.0), (3.0, 0.0, 0.0), (3.0, 0.0, inf), (3.0, 0.0, float("nan"))]
    assert fit_latency(useless, TRUE) == TRUE
    assert isfinite(fit_latency([], TRUE).alpha)


def test_two_known_parts_or_a_negative_one_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        fit_latency([], TRUE, beta=1, gamma_w=1)
    with pytest.raises(ValueError, match="at least 0"):
        fit_latency([], TRUE, beta=-1)
