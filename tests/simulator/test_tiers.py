from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pla_serve.policy.tiers import Tier, TierShare
from pla_serve.simulator.machine import KnownCost, load_machine
from pla_serve.simulator.report import TierReport, report
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.run import simulate
from pla_serve.simulator.setting import FleetSetting, RunSpec, Setting
from pla_serve.simulator.tiers import draw_tiers, kept_promise
from pla_serve.simulator.workload import at_load
from pla_serve.traces.load import load_trace
from pla_serve.traces.rows import Row
from tests.simulator.test_command import saved
from tests.simulator.test_command import simulate as command

TIERS = (
    "quick:ttft=300ms,tpot=50ms,share=0.3",
    "slow:ttft=3s,tpot=200ms,share=0.3",
    "night:share=0.4",
)
MACHINE = load_machine("h200-qwen2.5-7b")


def served(load: float = 0.7, policy: str = "length-aware", **setting: object) -> list[TierReport]:
    """Reports of the three tiers, of 400 requests."""
    fleet = setting.get("fleet")
    count = fleet.instances if isinstance(fleet, FleetSetting) else 1
    trace = load_trace("gen:chat+documents:requests=400:rate=2", seed=3)
    cost = KnownCost(MACHINE.profile)
    work = at_load(trace.name, trace.rows, cost, load, instances=count, decode_batch=64)
    made = replace(Setting(MACHINE, mode="mix", tiers=TIERS), **setting)  # type: ignore[arg-type]
    spec = RunSpec(work, policy, load, made)
    found = report(spec, simulate(spec))
    assert sum(tier.requests for tier in found.tiers) == found.requests == 400
    assert sum(tier.refused for tier in found.tiers) == found.refused
    assert sum(tier.ttft_s.count for tier in found.tiers) + found.refused == 400
    return list(found.tiers)


def test_tiers_are_drawn_by_session_and_seed() -> None:
    rows = [Row(n, 0.0, 10, 1, session=f"s{n // 5}") for n in range(2000)]
    shares = [TierShare(Tier("a"), 3.0), TierShare(Tier("b"), 1.0)]
    drawn = [tier.name for tier in draw_tiers(rows, shares, 1)]
    assert all(len(set(drawn[n : n + 5])) == 1 for n in range(0, 2000, 5))
    assert 0.65 < Counter(drawn)["a"] / 2000 < 0.85
    assert drawn == [tier.name for tier in draw_tiers(rows, shares, 1)]
    assert drawn != [tier.name for tier in draw_tiers(rows, shares, 2)]
    assert draw_tiers(rows, [], 1) == []


@pytest.mark.parametrize(
    ("tier", "gaps", "kept"),
    [
        (Tier("t", 1.0, 0.1), [0.59, 0.1, 0.1], True),
        (Tier("t", 1.0, 0.1), [0.65, 0.1], False),
        (Tier("t", 1.0, 0.1), [0.1, 0.75], False),
        (Tier("t", 0.4, 9.0), [], False),
        (Tier("t", None, 0.1), [0.09, 0.1], True),
        (Tier("t", None, 0.1), [0.12], False),
        (Tier("t", 1.0), [50.0], True),
    ],
)
def test_a_promise_by_hand(tier: Tier, gaps: list[float], kept: bool) -> None:
    """The first token came after 0.5 s."""
    job = SimulatedRequest("a", 10.0, 5, 0, first_token=10.5, gaps=array("f", gaps))
    assert kept_promise(job, tier) is kept


def test_below_capacity_promises_are_kept_and_few_are_refused() -> None:
    quick, slow, night = served(0.5)
    assert quick.attainment is not None
    assert quick.attainment >= 0.99
    assert slow.attainment is not None
    assert slow.attainment >= 0.99
    assert quick.refused + slow.refused <= 0.1 * (quick.requests + slow.requests)
    assert (night.refused, night.attainment) == (0, None)


@pytest.mark.parametrize("policy", ["length-aware", "fcfs"])
def test_overload_refuses_what_would_be_late_and_bulk_work_waits(policy: str) -> None:
    quick, slow, night = served(2.0, policy)
    assert quick.refused > 0
    assert night.refused == 0
    for tier in (quick, slow):
        assert tier.attainment is None or tier.attainment >= 0.75


@pytest.mark.parametrize(
    "setting",
    [
        {"fleet": FleetSetting(instances=2)},
        {"fleet": FleetSetting(instances=2, decode_instances=1), "mode": "pd-spatial"},
        {"fleet": FleetSetting(instances=2), "mode": "prefill"},
        {"mode": "pd-temporal"},
        {"wait_for_answers": True},
        {"fleet": FleetSetting(instances=3, fail_every=20.0)},
    ],
)
def test_every_request_has_an_end_in_every_mode(setting: dict[str, object]) -> None:
    _, _, night = served(1.5, **setting)
    assert night.refused == 0
    assert (night.itl_s is None) == (setting.get("mode") == "prefill")


def test_a_fleet_refuses_less_than_each_of_its_instances_would() -> None:
    """What one refuses another may take."""
    alone = served(0.9)[0].refused
    fleet = served(0.9, fleet=FleetSetting(instances=4))[0].refused
    assert fleet < alone


def test_the_command_shows_tiers_and_records_them(tmp_path: Path) -> None:
    flags = [word for tier in TIERS for word in ("--tier", tier)]
    trace = ("--trace", "gen:chat:requests=60:rate=2", "--policy", "length-aware")
    common = (*trace, "--mode", "mix", "--load", "0.5", "--jobs", "1", *flags)
    content = saved(tmp_path / "out.json", *common)
    assert [tier["tier"] for tier in content["runs"][0]["tiers"]] == [
        "quick:ttft=0.3s,tpot=0.05s",
        "slow:ttft=3s,tpot=0.2s",
        "night",
    ]
    assert content["flags"]["tier"] == list(TIERS)
    assert "By tier" in command(*common)
    for bad, reason in (("a:share=0", "above 0"), ("a:ttft=5", "with its unit")):
        assert reason in command(*trace, "--tier", bad, fails=True)
    assert "two tiers are named a" in command(*trace, "--tier", "a", "--tier", "a", fails=True)
