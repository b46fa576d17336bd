from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pla_serve.policy.registry import POLICIES
from pla_serve.simulator.machine import KnownCost, load_machine
from pla_serve.simulator.run import SimulationResult, _cluster, policy_maker, simulate
from pla_serve.simulator.setting import FleetSetting, RunSpec, Setting
from pla_serve.simulator.workload import TraceWorkload, at_load
from pla_serve.traces.load import load_trace

MACHINE = load_machine("h200-qwen2.5-7b")
COST = KnownCost(MACHINE.profile)
SETTING = Setting(MACHINE)


def workload(count: int = 300, load: float = 0.8, *, decode_batch: int = 0) -> TraceWorkload:
    trace = load_trace(f"gen:chat+documents:requests={count}:rate=2", seed=3)
    return at_load(trace.name, trace.rows, COST, load, decode_batch=decode_batch)


def run(
    policy: str, setting: Setting = SETTING, work: TraceWorkload | None = None
) -> SimulationResult:
    return simulate(RunSpec(work or workload(), policy, 0.8, setting))


def ttfts(outcome: SimulationResult) -> list[float]:
    return [job.ttft for job in outcome.jobs]


@pytest.mark.parametrize("mode", ["prefill", "mix", "pd-temporal"])
@pytest.mark.parametrize("policy", ["fcfs", "length-aware"])
def test_a_fleet_of_one_is_an_instance(policy: str, mode: str) -> None:
    setting = replace(SETTING, mode=mode)
    work = workload(150)
    make = policy_maker(policy, setting, COST)
    fleet = _cluster(make, setting, work, COST, None)
    alone = run(policy, setting, work)
    assert ttfts(alone) == pytest.approx(ttfts(fleet))
    assert alone.end == pytest.approx(fleet.end)
    assert alone.prefill == fleet.prefill
    for one, other in zip(alone.jobs, fleet.jobs, strict=True):
        assert list(one.gaps) == pytest.approx(list(other.gaps), abs=1e-6)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_nothing_is_interrupted_without_preemption(policy: str) -> None:
    outcome = run(policy, replace(SETTING, preemption=False), workload(120))
    assert outcome.prefill.express_batches == 0
    assert not np.isnan(ttfts(outcome)).any()


def test_knobs_go_before_the_machine() -> None:
    assert run("fcfs:max-batch-tokens=512").prefill.batches > run("fcfs").prefill.batches
    same = run(f"fcfs:max-batch-tokens={MACHINE.max_batch_tokens}")
    assert ttfts(same) == ttfts(run("fcfs"))
    with pytest.raises(ValueError, match="no knob"):
        run("fcfs:patience=3")


def test_modes_differ_in_where_answers_decode() -> None:
    ends: dict[str, SimulationResult] = {}
    work = workload(150, 0.5, decode_batch=64)
    fleet = FleetSetting(decode_instances=1)
    ends["prefill"] = run("fcfs", SETTING, work)
    ends["mix"] = run("fcfs", replace(SETTING, mode="mix"), work)
    ends["pd-temporal"] = run("fcfs", replace(SETTING, mode="pd-temporal"), work)
    ends["pd-spatial"] = run("fcfs", replace(SETTING, mode="pd-spatial", fleet=fleet), work)
    for mode, outcome in ends.items():
        produced = [job.produced for job in outcome.jobs]
        expected = [1 if mode == "prefill" else row.output_tokens for row in work.rows]
        assert produced == expected, mode
        assert [1 + len(job.gaps) for job in outcome.jobs] == expected, mode
    # Where answers decode elsewhere, first tokens do not know of them.
    assert ttfts(ends["pd-spatial"]) == pytest.approx(ttfts(ends["prefill"]))
    assert ends["pd-spatial"].decode.busy_seconds > 0
    assert np.mean(ttfts(ends["mix"])) > np.mean(ttfts(ends["prefill"]))
    answered = {
        mode: np.mean([job.finished - job.first_token for job in outcome.jobs])
        for mode, outcome in ends.items()
    }
    assert answered["pd-temporal"] > answered["mix"] > answered["pd-spatial"] * 0.5


def test_a_finite_cache_holds_no_more_than_the_trace_says() -> None:
    """Here what is cached is a session's own prompts."""
    work = workload(200, 0.3)
    said = sum(job.history for job in run("fcfs", SETTING, work).jobs)
    small, large = (
        sum(job.history for job in run("fcfs", replace(SETTING, kv_tokens=size), work).jobs)
        for size in (2000, 10**9)
    )
    assert 0 < small < large <= said


def test_clients_bound_what_is_under_way() -> None:
    outcome = run("fcfs", replace(SETTING, clients=3), workload(100))
    events = sorted(
        [(job.arrival, 1) for job in outcome.jobs] + [(job.first_token, -1) for job in outcome.jobs]
    )
    assert max(np.cumsum([change for _, change in events])) == 3


def test_turns_wait_for_answers_and_thoughts() -> None:
    work = workload(200, 3.0)
    waiting = replace(SETTING, wait_for_answers=True, token_seconds=0.5)
    outcome = run("fcfs", waiting, work)
    last: dict[str | None, int] = {}
    turns = 0
    for number, row in enumerate(work.rows):
        if row.session in last:
            before = outcome.jobs[last[row.session]]
            said = before.first_token + 0.5 * (before.output_tokens - 1)
            assert outcome.jobs[number].arrival >= said + (row.think or 0.0) - 1e-9
            turns += 1
        if row.session is not None:
            last[row.session] = number
    assert turns > 50


def test_failures_lose_no_request() -> None:
    fleet = FleetSetting(instances=3, fail_every=3.0, down_seconds=1.0)
    outcome = run("length-aware", replace(SETTING, fleet=fleet), workload(400, 2.0))
    assert outcome.prefill.failures > 0
    assert not np.isnan(ttfts(outcome)).any()


def test_pools_and_their_controller() -> None:
    fleet = FleetSetting(instances=4, short_instances=3, controller="balance")
    outcome = run("fcfs", replace(SETTING, fleet=fleet), workload(400, 3.0))
    assert outcome.moves > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "pd-spatial"}, "--decode-instances"),
        ({"clients": 0}, "--clients"),
        ({"clients": 2, "wait_for_answers": True}, "already"),
        ({"kv_tokens": -1}, "--kv-tokens"),
        ({"token_seconds": 0.1}, "--token-seconds"),
    ],
)
def test_settings_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTING, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instances": 0}, "at least 1 instance"),
        ({"routing": "predicted"}, "--routing needs"),
        ({"instances": 2, "routing": "dice"}, "unknown routing"),
        ({"instances": 2, "short_instances": 2}, "--short-instances"),
        ({"instances": 2, "controller": "balance"}, "--pool-controller"),
        ({"fail_every": 0.0}, "--fail-every"),
        ({"fail_every": 9.0, "down_seconds": -1.0}, "--down-seconds"),
    ],
)
def test_fleets_that_do_not_fit(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FleetSetting(**change)  # type: ignore[arg-type]
