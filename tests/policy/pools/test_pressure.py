from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.policy.pools.pressure import PressureController, PressureOptions, percentile
from pla_serve.policy.pools.protocol import Pool, PoolReport
from tests.policy.pools.fluid import FluidFleet

numbers = st.floats(-1e3, 1e3)


@given(st.lists(numbers, min_size=1), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(float(np.quantile(values, share)), abs=1e-9)


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.9)


pools = st.lists(
    st.builds(
        PoolReport,
        st.uuids().map(str),
        st.sampled_from([Pool.SHORT, Pool.LONG]),
        queued_short=st.floats(0, 50),
        queued_long=st.floats(0, 50),
        deadline_error=st.floats(-5, 5),
        utilisation=st.floats(0, 1),
    ),
    min_size=2,
    max_size=9,
    unique_by=lambda report: report.id,
)


@given(pools, st.floats(0, 3), st.floats(0, 3), st.floats(0, 3), st.floats(0, 1), st.integers(1, 3))
def test_algorithm_2_line_by_line(instances, alpha, beta, gamma, tau, n_min) -> None:
    psi = {
        r.id: alpha * (r.queued_short + r.queued_long)
        + beta * r.deadline_error
        - gamma * r.utilisation
        for r in instances
    }
    short = [r.id for r in instances if r.pool is Pool.SHORT]
    long = [r.id for r in instances if r.pool is Pool.LONG]
    expected = None
    p_s, p_l = _p90([psi[k] for k in short]), _p90([psi[k] for k in long])
    if p_s > (1 + tau) * p_l and len(long) > n_min:
        expected = (min(long, key=lambda k: (psi[k], k)), Pool.SHORT)
    elif p_l > (1 + tau) * p_s and len(short) > n_min:
        expected = (min(short, key=lambda k: (psi[k], k)), Pool.LONG)
    controller = PressureController(PressureOptions(alpha, beta, gamma, tau, 5.0, n_min))
    moves = controller.decide(0.0, instances)
    assert [(m.instance_id, m.target) for m in moves] == ([expected] if expected else [])


def _p90(values: Sequence[float]) -> float:
    return percentile(values, 0.9) if values else float("inf")


def loaded(short: int, long: int, *, draining: bool = False) -> list[PoolReport]:
    return [
        PoolReport(f"s{n}", Pool.SHORT, queued_short=100.0, draining=draining) for n in range(short)
    ] + [PoolReport(f"l{n}", Pool.LONG, queued_long=1.0) for n in range(long)]


def test_one_move_in_a_cooldown() -> None:
    controller = PressureController(PressureOptions(cooldown_seconds=5.0))
    assert len(controller.decide(0.0, loaded(1, 4))) == 1
    assert controller.decide(4.99, loaded(2, 3)) == ()
    assert len(controller.decide(5.0, loaded(2, 3))) == 1


def test_none_while_one_is_on_its_way() -> None:
    controller = PressureController()
    assert controller.decide(0.0, loaded(1, 4, draining=True)) == ()
    assert len(controller.decide(1.0, loaded(1, 4))) == 1, "and no cool-down was started"


def test_a_pool_gives_none_below_its_least_size() -> None:
    controller = PressureController(PressureOptions(min_instances=2))
    assert controller.decide(0.0, loaded(2, 2)) == ()


def test_an_empty_pool_is_given_one() -> None:
    moves = PressureController().decide(0.0, [PoolReport(f"l{n}", Pool.LONG) for n in range(2)])
    assert [move.target for move in moves] == [Pool.SHORT]


def test_as_published_equal_negative_pressures_never_come_to_rest() -> None:
    """(1 + tau) P is below a negative P: without any backlog, all but one long become short."""
    controller = PressureController(PressureOptions(cooldown_seconds=1.0))
    short, long, sizes = 4, 4, []
    for second in range(10):
        instances = [PoolReport(f"s{n}", Pool.SHORT, utilisation=0.5) for n in range(short)]
        instances += [PoolReport(f"l{n}", Pool.LONG, utilisation=0.5) for n in range(long)]
        for move in controller.decide(float(second), instances):
            long += 1 if move.target is Pool.LONG else -1
            short = 8 - long
        sizes.append(long)
    assert sizes == [3, 2, 1, 2, 1, 2, 1, 2, 1, 2]


def test_it_needs_many_periods_for_a_burst() -> None:
    fleet = FluidFleet(PressureController(PressureOptions(cooldown_seconds=5.0)), 2, 6)
    fleet.run(5, lambda _: (1.0, 4.0))
    fleet.burst(Pool.SHORT, 100.0)
    fleet.run(1, lambda _: (1.0, 4.0))
    assert fleet.short <= 3


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha", -1), ("gamma", float("nan")), ("cooldown_seconds", -1), ("min_instances", 0)],
)
def test_options_out_of_range(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        PressureOptions(**{field: value})  # type: ignore[arg-type]
