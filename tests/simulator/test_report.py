from __future__ import annotations

from pathlib import Path

import pytest

from pla_serve.policy.cost import CostProfile
from pla_serve.simulator.plot import draw
from pla_serve.simulator.report import ClassShares, RunReport, load_report, report, save
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.run import SimulationResult
from pla_serve.simulator.setting import FleetSetting, Objective, RunSpec, Setting
from pla_serve.simulator.totals import Totals
from pla_serve.simulator.workload import TraceWorkload
from pla_serve.traces.rows import Row
from tests.simulator.fleets import MACHINE

assert CostProfile(1e-3, 0, 0, 0, 0.02) == MACHINE.profile  # the numbers below count on it


def job(number: int, arrival: float, new: int, history: int, ttft: float) -> SimulatedRequest:
    made = SimulatedRequest(str(number), arrival, new, history, 1)
    made.first_token = made.finished = arrival + ttft
    return made


def by_hand(*, clients: int | None = None, jobs: list[SimulatedRequest] | None = None) -> RunReport:
    """Alone: 0.12, 0.276, 0.277 and 1.02 s."""
    jobs = jobs or [
        job(0, 2.0, 100, 900, 0.39),
        job(1, 3.0, 256, 0, 1.4),
        job(2, 3.0, 257, 0, 1.3),
        job(3, 6.0, 1000, 0, 6.02),
    ]
    rows = tuple(
        Row(i, j.arrival, j.prompt_tokens, 1, cached_tokens=j.history) for i, j in enumerate(jobs)
    )
    setting = Setting(
        MACHINE, FleetSetting(instances=2), seed=5, clients=clients, objective=Objective(0.4, 5.0)
    )
    load = 0.5 if clients is None else None
    spec = RunSpec(TraceWorkload("mine", rows, 1.0, 1.693, "by hand"), "fcfs", load, setting)
    return report(spec, SimulationResult(jobs, 12.02, Totals(4.008, 1613, 4), Totals()))


def test_the_numbers_of_a_run_by_hand() -> None:
    run = by_hand()
    assert (run.trace, run.policy, run.load, run.instances) == ("mine", "fcfs", 0.5, 2)
    assert (run.machine, run.seed, run.requests) == ("test", 5, 4)
    assert run.makespan_s == pytest.approx(10.02)
    assert run.throughput_tokens_per_s == pytest.approx(1613 / 10.02)
    assert run.utilisation == pytest.approx(4.008 / 10.02 / 2)
    assert [run.ttft_s.short.count, run.ttft_s.long.count, run.ttft_s.all.count] == [2, 2, 4]
    assert run.ttft_s.short.p50 == pytest.approx((0.39 + 1.4) / 2)
    assert run.ttft_s.long.mean == pytest.approx((1.3 + 6.02) / 2)
    assert run.ttft_s.long.p90 == pytest.approx(1.3 + 0.9 * 4.72)
    assert run.ttft_s.all.max == pytest.approx(6.02)
    assert run.idle_ttft_s.short.max == pytest.approx(0.276)
    # In time: 0.39 of 0.6; late: 1.4 of 1.38; in time: 1.3 of 1.385; late: 6.02 of 5.1.
    assert (run.slo_violation.short, run.slo_violation.long) == (0.5, 0.5)
    assert run.slo_violation.all == 0.5
    assert run.wait_longest_s == pytest.approx(5.0)
    assert run.offered_load == pytest.approx(1.693 / 4 / 2)
    assert (run.prompt_tokens, run.cached_tokens) == (2513, 900)


def test_a_class_without_requests_has_no_numbers() -> None:
    run = by_hand(jobs=[job(0, 0.0, 10, 0, 0.5), job(1, 1.0, 10, 0, 0.03)])
    assert run.ttft_s.long.count == 0
    assert run.ttft_s.long.p90 is None
    assert run.slo_violation.long is None
    assert run.slo_violation.short == 0.5  # 0.4 s is more than five times its 0.03 s


def test_a_closed_loop_has_no_load() -> None:
    run = by_hand(clients=7)
    assert (run.load, run.offered_load, run.clients) == (None, None, 7)


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    runs = [by_hand(), by_hand(clients=3)]
    save(tmp_path / "deep" / "x.json", runs, {"environment": {}}, interrupted=False)
    assert load_report(tmp_path / "deep" / "x.json") == runs
    (tmp_path / "y.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold simulated runs"):
        load_report(tmp_path / "y.json")


def test_a_picture_is_drawn_of_whatever_there_is(tmp_path: Path) -> None:
    one_class = by_hand(jobs=[job(0, 0.0, 10, 0, 0.5), job(1, 1.0, 10, 0, 0.03)])
    for number, runs in enumerate(([by_hand()], [one_class], [by_hand(clients=3), one_class])):
        path = tmp_path / "new" / f"{number}.png"
        draw(runs, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_gaps_pauses_and_attainment_by_hand() -> None:
    """A step alone takes 21 ms, so that tokens are due every 0.105 s."""
    short, long = job(0, 0.0, 100, 0, 0.12), job(1, 0.0, 1000, 0, 1.02)
    for made, gaps in ((short, (0.05, 0.3, 0.05)), (long, (0.1, 0.1))):
        made.output_tokens = 1 + len(gaps)
        made.last_token = made.first_token
        for gap in gaps:
            made.token(made.last_token + gap)
    rows = tuple(Row(i, float(i), 100, 4) for i in range(2))
    setting = Setting(MACHINE, mode="mix", objective=Objective(0.4, 5.0))
    spec = RunSpec(TraceWorkload("mine", rows, 1.0, 1.0, "by hand"), "fcfs", 0.5, setting)
    run = report(spec, SimulationResult([short, long], 3.0, Totals(1.0, 1100, 2), Totals()))
    assert run.itl_s is not None
    assert run.pause_s is not None
    assert run.idle_itl_s is not None
    assert (run.itl_s.short.count, run.itl_s.long.count, run.itl_s.all.count) == (3, 2, 5)
    assert run.itl_s.short.p50 == pytest.approx(0.05)
    assert run.itl_s.all.max == run.pause_s.short.max == pytest.approx(0.3)
    assert run.pause_s.long.p50 == pytest.approx(0.1)
    assert run.idle_itl_s.all.max == pytest.approx(0.021)
    assert run.attainment.short == 1.0  # due 0.6 + 0.21, made at 0.12 + 0.35
    assert run.attainment.long == 1.0
    late = job(0, 0.0, 100, 0, 0.59)
    late.output_tokens, late.last_token = 3, late.first_token
    late.token(1.0)
    spec = RunSpec(TraceWorkload("mine", rows, 1.0, 1.0, "by hand"), "fcfs", 0.5, setting)
    assert report(spec, SimulationResult([late], 3.0, Totals(1, 1, 1), Totals())).attainment == (
        ClassShares(0.0, None, 0.0)
    )
