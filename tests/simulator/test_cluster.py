from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.pools.balance import BalanceController
from pla_serve.policy.pools.pressure import PressureController
from pla_serve.policy.pools.protocol import Pool
from pla_serve.simulator.cluster_options import ClusterOptions
from pla_serve.simulator.faults import Fault, draw_faults
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.machine import KnownCost
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.solo import serve
from pla_serve.simulator.turns import ClosedLoop, OpenLoop, SimulatedTurn
from tests.simulator.fleets import MACHINE, plain, policies, simulate


def traffic(seed: int, count: int, rate: float, outputs: int = 1) -> list[SimulatedTurn]:
    draw = random.Random(seed)
    now, turns = 0.0, []
    for index in range(count):
        now += draw.expovariate(rate)
        tokens = draw.choice((20, 60, 200, 900, 3000))
        turns.append(SimulatedTurn(index, now, tokens, draw.randint(1, outputs), ()))
    return turns


def alone(
    turns: list[SimulatedTurn], policy: str, *, decodes: bool = False
) -> dict[int, SimulatedRequest]:
    """The same on one instance by the short way through time."""

    def heard(job: SimulatedRequest, now: float) -> None: ...

    cost = KnownCost(MACHINE.profile)
    instance = SimulatedInstance(
        policies(policy)(), cost, MACHINE.layers, heard, heard, decodes=decodes
    )
    jobs = [
        SimulatedRequest(str(t.index), t.time, t.prompt_tokens, 0, t.output_tokens, row=t.index)
        for t in turns
    ]
    serve(instance, jobs)
    return {job.row: job for job in jobs}


@pytest.mark.parametrize("policy", ["fcfs", "length-aware", "flowprefill"])
@pytest.mark.parametrize("decode", ["none", "same"])
def test_round_robin_is_so_many_instances_on_their_own(policy: str, decode: Any) -> None:
    turns = traffic(1, 200, 4.0, 8)
    result = simulate(turns, policy, instances=3, routing="round-robin", decode=decode)
    for first in range(3):
        expected = alone(turns[first::3], policy, decodes=decode == "same")
        for row, job in expected.items():
            assert result.jobs[row].first_token == pytest.approx(job.first_token)
            assert result.jobs[row].finished == pytest.approx(job.finished)
    computed = sum(node.computed_tokens for node in result.nodes.values())
    assert computed == sum(turn.prompt_tokens for turn in turns)


@pytest.mark.parametrize(
    "routing", ["round-robin", "least-loaded", "cache-aware", "class-pools", "predicted"]
)
def test_equal_arguments_give_equal_runs(routing: str) -> None:
    turns = traffic(2, 300, 20.0, 3)
    runs = [
        simulate(
            turns,
            "length-aware",
            instances=4,
            short_instances=1,
            routing=routing,
            decode="same",
            controller=BalanceController(),
            faults=draw_faults(4, 10.0, 1.0, 15.0, seed=3),
        )
        for _ in range(2)
    ]
    first, second = ([(j.first_token, j.finished) for j in run.jobs] for run in runs)
    assert first == second
    assert runs[0].nodes == runs[1].nodes
    assert runs[0].moves == runs[1].moves


def test_prediction_beats_turns() -> None:
    turns = traffic(4, 800, 7.0)
    mean = {
        routing: sum(j.ttft for j in simulate(turns, instances=8, routing=routing).jobs) / 800
        for routing in ("round-robin", "predicted")
    }
    assert mean["predicted"] < 0.8 * mean["round-robin"]


def test_kv_is_sent_to_a_decode_instance() -> None:
    """Prefill 0.02 + 0.1 s; 100 tokens sent in 0.01 + 0.025 s; two more tokens of 0.021 s."""
    (job,) = simulate(plain((1.0, 100, 3)), decode="apart", decode_instances=1).jobs
    assert job.first_token == pytest.approx(1.12)
    assert job.finished == pytest.approx(1.12 + 0.035 + 2 * 0.021)


def test_apart_the_decode_steps_disturb_no_prefill() -> None:
    turns = traffic(5, 200, 1.0, 30)
    apart = simulate(turns, instances=1, decode="apart", decode_instances=2)
    none = simulate(turns, instances=1)
    assert [j.first_token for j in apart.jobs] == [j.first_token for j in none.jobs]
    assert [j.produced for j in apart.jobs] == [t.output_tokens for t in turns]
    assert all(job.finished >= job.first_token for job in apart.jobs)


def test_one_token_answers_never_reach_a_decode_instance() -> None:
    result = simulate(plain((0.0, 100, 1)), decode="apart", decode_instances=1)
    assert result.nodes["d0"].batches == 0


@st.composite
def disasters(draw: st.DrawFn) -> tuple[list[SimulatedTurn], dict[str, Any], list[Fault]]:
    turns = traffic(draw(st.integers(0, 999)), draw(st.integers(1, 40)), 8.0, 6)
    options: dict[str, Any] = {"instances": draw(st.integers(1, 3))}
    options["decode"] = draw(st.sampled_from(["none", "same", "apart"]))
    options["decode_instances"] = draw(st.integers(1, 2)) if options["decode"] == "apart" else 0
    options["short_instances"] = draw(st.integers(0, options["instances"]))
    options["routing"] = draw(st.sampled_from(["predicted", "class-pools", "round-robin"]))
    options["recalls"] = draw(st.booleans())
    options["start_seconds"] = draw(st.sampled_from([0.0, 0.7]))
    nodes = options["instances"] + options["decode_instances"]
    fault = st.builds(Fault, st.floats(0, 8), st.integers(0, nodes - 1), st.floats(0, 3))
    return turns, options, draw(st.lists(fault, max_size=12))


@given(disasters(), st.sampled_from(["fcfs", "length-aware", "flowprefill"]))
@settings(max_examples=120, deadline=None)
def test_whatever_fails_every_request_is_answered_once(disaster, policy: str) -> None:
    turns, options, faults = disaster
    result = simulate(turns, policy, faults=faults, **options)
    wanted = [1 if options["decode"] == "none" else turn.output_tokens for turn in turns]
    assert [job.produced for job in result.jobs] == wanted
    for job, turn in zip(result.jobs, turns, strict=True):
        assert job.arrival == turn.time
        assert job.first_token >= job.arrival + turn.prompt_tokens * 1e-3
        assert job.finished >= job.first_token
    assert result.end == max(job.finished for job in result.jobs)
    assert sum(node.failures for node in result.nodes.values()) <= len(faults)


def test_before_its_first_token_a_request_starts_anew_elsewhere() -> None:
    result = simulate(plain((0.0, 1000), (0.0, 1000)), instances=2, faults=[Fault(0.5, 0, 100.0)])
    assert result.restarts == 1
    assert sorted(job.first_token for job in result.jobs) == pytest.approx([1.02, 2.04])


def test_after_its_first_token_prompt_and_tokens_are_prefilled_again() -> None:
    """0.12 s to the first token, 0.021 s for each of three more; then 104 tokens elsewhere."""
    result = simulate(
        plain((0.0, 100, 5)), instances=2, decode="same", faults=[Fault(0.19, 0, 100.0)]
    )
    (job,) = result.jobs
    assert job.first_token == pytest.approx(0.12), "the client has had it"
    assert (job.new_tokens, result.restarts) == (104, 1)
    assert job.finished == pytest.approx(0.19 + 0.02 + 0.104)


def test_kv_on_its_way_is_lost_with_its_sender() -> None:
    """Its reader computes it: the request stays there."""
    result = simulate(
        plain((0.0, 100, 2)),
        instances=2,
        decode="apart",
        decode_instances=1,
        faults=[Fault(0.13, 0, 100.0)],
    )
    assert result.restarts == 0
    assert result.nodes["d0"].computed_tokens == 101
    assert result.jobs[0].finished == pytest.approx(0.13 + 0.02 + 0.101), "by the prefill"


def test_all_wait_for_an_instance_that_starts() -> None:
    result = simulate(plain((1.0, 80)), faults=[Fault(0.5, 0, 2.0)], start_seconds=3.0)
    assert result.jobs[0].first_token == pytest.approx(0.5 + 2.0 + 3.0 + 0.1)


def test_without_a_decode_instance_a_request_decodes_where_it_can() -> None:
    """The decode instance dies before it is asked for memory; the prompt is prefilled again."""
    result = simulate(
        plain((0.0, 80, 2)), decode="apart", decode_instances=1, faults=[Fault(0.0, 1, 9.0)]
    )
    assert result.jobs[0].first_token == pytest.approx(0.1)
    assert result.jobs[0].finished == pytest.approx(0.1 + 0.02 + 0.081)
    assert result.nodes["p0"].computed_tokens == 80 + 81


def test_a_fleet_that_died_for_good_is_an_error() -> None:
    for controller in (None, BalanceController()):
        with pytest.raises(RuntimeError, match="2 requests are left"):
            simulate(
                plain((1.0, 80), (2.0, 80)),
                faults=[Fault(0.5, 0, float("inf"))],
                short_instances=1,
                controller=controller,
            )


def session(*turns: tuple[float, int, int, float]) -> list[SimulatedTurn]:
    """Time, prompt, output and think of turns, each of which begins as the one before it."""
    return [
        SimulatedTurn(index, time, prompt, output, (range(prompt),), index - 1, think)
        for index, (time, prompt, output, think) in enumerate(turns)
    ]


def test_a_turn_waits_for_the_answer_before_it() -> None:
    turns = session((0.0, 1000, 1, 0.0), (0.5, 1100, 1, 2.0), (9.0, 1200, 1, 0.0))
    result = simulate(turns)
    assert [job.arrival for job in result.jobs] == pytest.approx([0.0, 1.02 + 2.0, 9.0])
    result = simulate(turns, source=OpenLoop(turns, wait=False))
    assert [job.arrival for job in result.jobs] == [0.0, 0.5, 9.0]


def test_answers_that_are_not_simulated_take_time_all_the_same() -> None:
    turns = session((0.0, 100, 11, 0.0), (0.0, 200, 1, 0.5))
    assert simulate(turns, token_seconds=0.1).jobs[1].arrival == pytest.approx(0.12 + 1.0 + 0.5)


@given(st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_closed_loop_never_has_more_than_its_clients(clients: int, seed: int) -> None:
    turns = traffic(seed, 60, 1.0, 3)
    source = ClosedLoop(turns, clients)
    result = simulate(turns, source=source, instances=2, decode="same")
    events = sorted(
        [(job.arrival, 1) for job in result.jobs] + [(job.finished, -1) for job in result.jobs]
    )
    inside, most = 0, 0
    for _, change in events:
        inside += change
        most = max(most, inside)
    assert most == min(clients, 60)


def test_a_client_plays_a_session_to_its_end() -> None:
    turns = session((0.0, 100, 1, 7.0), (50.0, 200, 1, 7.0))
    turns.append(SimulatedTurn(2, 0.0, 100, 1, ()))
    result = simulate(turns, source=ClosedLoop(turns, 1))
    assert [job.arrival for job in result.jobs] == pytest.approx([0.0, 0.12, 0.34])


def test_the_next_turn_finds_its_prefix() -> None:
    turns = session((0.0, 1000, 1, 0.0), (5.0, 1100, 1, 0.0))
    for routing in ("predicted", "cache-aware"):
        result = simulate(turns, instances=4, routing=routing, cache_tokens=5000)
        assert [(j.new_tokens, j.history) for j in result.jobs] == [(1000, 0), (100, 1000)]
        assert result.cached_tokens == 1000
    assert simulate(turns, instances=4, cache_tokens=0).cached_tokens == 0
    assert simulate(turns, cache_tokens=400).jobs[1].history == 400
    blind = simulate(turns, instances=2, routing="round-robin", cache_tokens=5000)
    assert blind.jobs[1].history == 0


def test_a_failure_loses_the_cache() -> None:
    turns = session((0.0, 1000, 1, 0.0), (5.0, 1100, 1, 0.0))
    result = simulate(turns, cache_tokens=5000, faults=[Fault(2.0, 0, 1.0)])
    assert result.cached_tokens == 0


def test_a_prefix_is_fetched_from_a_busy_holder() -> None:
    """i0 holds 1,000 tokens and is busy for 6 s: fetching takes 0.01 + 0.25 s."""
    turns = session((0.0, 1000, 1, 0.0))
    turns.append(SimulatedTurn(1, 4.0, 6000, 1, (range(1000), range(7000, 12000))))
    turns.append(SimulatedTurn(2, 4.0, 1300, 1, (range(1000), range(2000, 2300))))
    options = {"instances": 2, "cache_tokens": 9000, "express": False, "boundary_tokens": 0}
    result = simulate(turns, fetch_kv=True, **options)
    assert (result.jobs[2].new_tokens, result.fetched_tokens) == (300, 1000)
    assert result.jobs[2].ttft == pytest.approx(0.01 + 0.25 + 0.02 + 0.3)
    assert simulate(turns, fetch_kv=False, **options).jobs[2].ttft == pytest.approx(1.32)


def bursty(seed: int) -> list[SimulatedTurn]:
    """Steady longs; after 20 s a burst of shorts, eight instances' work for two seconds."""
    draw = random.Random(seed)
    requests = [(second * 0.5 + draw.random() * 0.1, 2000) for second in range(120)]
    requests += [(20.0 + n * 1e-4, 200) for n in range(400)]
    return plain(*sorted(requests))


@pytest.mark.parametrize("policy", ["fcfs", "length-aware"])
def test_a_burst_of_shorts_is_answered_in_one_control_period(policy: str) -> None:
    options = {
        "instances": 8,
        "short_instances": 1,
        "routing": "class-pools:overflow_seconds=inf",
        "control_seconds": 1.0,
        "express": policy != "fcfs",
        "interruptible": policy != "fcfs",
    }
    turns = bursty(1)
    p90 = {}
    for name, controller in (
        ("none", None),
        ("pressure", PressureController()),
        ("balance", BalanceController()),
    ):
        result = simulate(turns, policy, controller=controller, **options)
        shorts = sorted(j.ttft for j in result.jobs if j.new_tokens <= 256)
        p90[name] = shorts[len(shorts) * 9 // 10]
        if name == "balance":
            first = [move for time, move in result.moves if 20.0 < time <= 21.5]
            assert len(first) >= 2
            assert {move.target for move in first} == {Pool.SHORT}
    assert p90["balance"] <= p90["pressure"] <= p90["none"] * 1.001
    assert p90["balance"] < p90["none"]


def test_what_waits_is_sent_again_when_an_instance_joins() -> None:
    """Both go to the second while the first is down; when it starts, it is sent the one that was
    not begun."""
    requests = plain((0.5, 2000), (0.6, 1000))
    for recalls, expected in ((True, 1.0 + 1.02), (False, 0.5 + 2.02 + 1.02)):
        result = simulate(
            requests, instances=2, faults=[Fault(0.1, 0, 0.9)], recalls=recalls, express=False
        )
        assert result.jobs[0].first_token == pytest.approx(2.52)
        assert result.jobs[1].first_token == pytest.approx(expected)


def test_deadlines_are_told_to_policies_and_controllers() -> None:
    seen: list[float] = []

    class Watch(BalanceController):
        def decide(self, now, instances):  # type: ignore[no-untyped-def]
            seen.extend(report.deadline_error for report in instances)
            return ()

    turns = plain((0.0, 100), (3.5, 100))
    result = simulate(
        turns, short_instances=1, controller=Watch(), deadline=lambda turn: turn.prompt_tokens / 200
    )
    assert result.jobs[1].deadline == 4.0
    assert seen[:2] == pytest.approx([0.12 - 0.5, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instances": 0}, "instances must be at least 1"),
        ({"short_instances": 2}, "short_instances must lie in 0..1"),
        ({"decode": "apart"}, "go together"),
        ({"decode_instances": 1}, "go together"),
        ({"decode": "there"}, "none, same or apart"),
        ({"decode": "same", "token_seconds": 0.1}, "token_seconds is for"),
        ({"cache_tokens": -1}, "cache_tokens must be"),
        ({"start_seconds": float("inf")}, "start_seconds must be"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterOptions(**options)


def test_misuse_is_named() -> None:
    turns = plain((0.0, 10))
    with pytest.raises(ValueError, match="for none of the 1 instances"):
        simulate(turns, faults=[Fault(0.0, 1, 0.0)])
    with pytest.raises(ValueError, match="needs short_instances"):
        simulate(turns, controller=BalanceController())
    with pytest.raises(ValueError, match="control period"):
        simulate(turns, controller=BalanceController(), short_instances=1, control_seconds=0.0)
    with pytest.raises(ValueError, match="at least 1 client"):
        ClosedLoop(turns, 0)
    with pytest.raises(ValueError, match="mean_seconds"):
        draw_faults(1, 0.0, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="at least 0"):
        Fault(-1.0, 0, 0.0)
