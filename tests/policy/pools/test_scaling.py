from __future__ import annotations

from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.pools.balance import ClassDemand
from pla_serve.policy.pools.scaling import Scaler, ScalingOptions


def test_steady_arrivals_leave_room_for_chance() -> None:
    scaler = Scaler(ScalingOptions(target_utilisation=0.8))
    assert scaler.desired(0.0, [ClassDemand(0.0, 1.6), ClassDemand(0.0, 2.4)]) == 5


def test_a_backlog_asks_for_what_clears_it() -> None:
    scaler = Scaler(ScalingOptions(horizon_seconds=30.0))
    assert scaler.desired(0.0, [ClassDemand(300.0, 2.0)]) == 12


@given(st.lists(st.tuples(st.floats(0.1, 60), st.floats(0, 40)), min_size=1, max_size=40))
def test_it_is_the_highest_of_the_calm_while(steps: list[tuple[float, float]]) -> None:
    scaler = Scaler(ScalingOptions(target_utilisation=1.0, calm_seconds=100.0))
    now, seen = 0.0, []
    for pause, rate in steps:
        now += pause
        seen.append((now, max(1, ceil(rate - 1e-9))))
        expected = max(value for time, value in seen if time >= now - 100.0)
        assert scaler.desired(now, [ClassDemand(0.0, rate)]) == expected


def test_bounds() -> None:
    scaler = Scaler(ScalingOptions(min_instances=2, max_instances=4))
    assert scaler.desired(0.0, []) == 2
    assert scaler.desired(1.0, [ClassDemand(1e9, 0.0)]) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("horizon_seconds", 0),
        ("target_utilisation", 0),
        ("target_utilisation", 1.1),
        ("calm_seconds", -1),
        ("min_instances", 0),
        ("max_instances", 0),
    ],
)
def test_options_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        ScalingOptions(**{field: value})  # type: ignore[arg-type]
