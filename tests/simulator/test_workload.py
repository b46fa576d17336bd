from __future__ import annotations

from dataclasses import replace

import pytest

from pla_serve.policy.cost import CostProfile
from pla_serve.simulator.machine import KnownCost
from pla_serve.simulator.workload import at_load, sessions_at_load, uncached, work_seconds
from pla_serve.traces.load import Trace
from pla_serve.traces.rows import Row

COST = KnownCost(CostProfile(1e-3, 0.0, 0.0, 0.0, 0.1))
"""A tenth of a second, and a millisecond a token."""


def rows() -> list[Row]:
    return [Row(i, float(i * i), 1000, 11, cached_tokens=100 * i) for i in range(5)]


def test_the_last_token_is_never_cached() -> None:
    assert uncached(Row(0, 0.0, 50, 1, cached_tokens=50)) == (1, 49)
    assert uncached(Row(0, 0.0, 50, 1)) == (50, 0)


def test_work_is_each_prompt_alone_and_a_share_of_each_step() -> None:
    prompts = 5 * 0.1 + (1.0 + 0.9 + 0.8 + 0.7 + 0.6)
    assert work_seconds(rows(), COST) == pytest.approx(prompts)
    steps = 5 * 10 * (0.001 + 0.1 / 8)
    assert work_seconds(rows(), COST, decode_batch=8) == pytest.approx(prompts + steps)


@pytest.mark.parametrize("instances", [1, 3])
@pytest.mark.parametrize("load", [0.5, 2.0])
def test_gaps_are_stretched_alike_until_the_load_is_met(load: float, instances: int) -> None:
    workload = at_load("x", rows(), COST, load, instances=instances)
    assert workload.offered_seconds / (workload.span * instances) == pytest.approx(load)
    arrivals = [job.arrival for job in workload.jobs()]
    assert [time / arrivals[1] for time in arrivals] == pytest.approx([0, 1, 4, 9, 16])
    assert [job.new_tokens for job in workload.jobs()] == [1000, 900, 800, 700, 600]


def own_clocks(sessions: int) -> Trace:
    recorded = tuple(
        Row(
            3 * session + turn,
            (0.0, 5.0, 5000.0)[turn],
            1000,
            1,
            session=str(session),
            cached_tokens=600 if turn else 0,
            turn=turn + 1,
        )
        for session in range(sessions)
        for turn in range(3)
    )
    return Trace("own", recorded, "", 0, recorded)


def test_sessions_keep_their_pauses_and_start_over_the_time_that_makes_the_load() -> None:
    trace = own_clocks(300)
    workload = sessions_at_load(trace, COST, 0.8, seed=1, instances=2, max_pause=600)
    span = 300 * (1.1 + 0.5 + 0.5) / 0.8 / 2
    times: dict[str | None, list[float]] = {}
    for row in workload.rows:
        times.setdefault(row.session, []).append(row.arrival or 0.0)
    for first, second, third in times.values():
        assert (second - first, third - second) == pytest.approx((5, 600))
    starts = sorted(found[0] for found in times.values())
    assert starts[0] == 0
    assert starts[150] == pytest.approx(span / 2, rel=0.15)
    assert starts[-1] == pytest.approx(span, rel=0.05)
    assert workload == sessions_at_load(trace, COST, 0.8, seed=1, instances=2, max_pause=600)


def test_another_load_draws_the_same_starts() -> None:
    light, heavy = (
        sessions_at_load(own_clocks(50), COST, load, seed=1, max_pause=0) for load in (0.2, 0.8)
    )
    assert [row.session for row in light.rows] == [row.session for row in heavy.rows]
    assert light.rows[-1].arrival == pytest.approx(4 * (heavy.rows[-1].arrival or 0.0))


def test_no_load_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        at_load("x", rows(), COST, 0.0)
    with pytest.raises(ValueError, match="all requests arrive at once"):
        at_load("x", [replace(row, arrival=3.0) for row in rows()], COST, 0.5)
    with pytest.raises(ValueError, match="on one clock"):
        sessions_at_load(replace(own_clocks(2), recorded=()), COST, 0.5, seed=0)
