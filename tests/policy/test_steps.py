"""Plans for an engine that builds a batch a step and cannot be left within one."""

from __future__ import annotations

from math import inf
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch, BatchClass, Capabilities, Chunk, PrefillRequest, Wait
from pla_serve.policy.step_length import LEAST_OVERHEAD, MOST_OVERHEAD, StepLength
from pla_serve.policy.steps import StepPlan, StepPlanner

PROFILE = CostProfile(1e-3, 1e-7, 1e-6, 1e-4, 4e-2)
BUDGET = 2048


def planner_of(**knobs: object) -> StepPlanner:
    config = PolicyConfig(max_batch_tokens=BUDGET, boundary_tokens=256)
    return StepPlanner(config, CostModel(PROFILE), **knobs)  # type: ignore[arg-type]


def request(name: str, tokens: int, arrival: float = 0.0, priority: int = 0) -> PrefillRequest:
    return PrefillRequest(name, arrival, tokens, priority=priority)


def carry_out(planner: StepPlanner, plan: StepPlan, left: dict[str, int], now: float) -> float:
    """Do all that was planned; returns the time after it."""
    after = {}
    for chunk in plan.chunks:
        left[chunk.request_id] -= chunk.tokens
        after[chunk.request_id] = (left[chunk.request_id], chunk.history + chunk.tokens)
    planner.settle(plan, after, now)
    batch = Batch(plan.kind, plan.chunks)
    seconds = CostModel(PROFILE).seconds(batch)
    planner.finished(plan, batch, seconds, now + seconds)
    return now + seconds


def test_nothing_to_do_is_a_step_without_prefills() -> None:
    assert planner_of().plan(0.0, BUDGET) == StepPlan(BatchClass.DECODE)


def test_shorts_go_first_and_alone() -> None:
    planner = planner_of()
    for name, tokens in (("long", 3000), ("a", 50), ("b", 60)):
        planner.add(request(name, tokens), 0.0)
    plan = planner.plan(0.0, BUDGET)
    assert plan.kind is BatchClass.SHORT
    assert {chunk.request_id for chunk in plan.chunks} == {"a", "b"}


def test_a_plan_keeps_to_the_budget_and_what_it_leaves_out_is_planned_next() -> None:
    planner, left = planner_of(), dict.fromkeys("abcd", 200)
    for number, name in enumerate(left):
        planner.add(request(name, 200, arrival=number), float(number))
    plan = planner.plan(4.0, 450)
    assert [(chunk.request_id, chunk.tokens) for chunk in plan.chunks] == [
        ("a", 200),
        ("b", 200),
        ("c", 50),
    ]
    carry_out(planner, plan, left, 4.0)
    names = [chunk.request_id for chunk in planner.plan(5.0, 450).chunks]
    assert set(names) == {"c", "d"}


def test_what_the_engine_did_not_do_waits_on() -> None:
    planner = planner_of()
    planner.add(request("a", 50), 0.0)
    plan = planner.plan(0.0, BUDGET)
    planner.settle(plan, {}, 0.0)
    assert planner.plan(1.0, BUDGET).chunks == plan.chunks


def test_the_engine_may_do_less_or_more_than_was_planned() -> None:
    planner = planner_of()
    planner.add(request("a", 50), 0.0)
    planner.add(request("long", 3000), 0.0)
    plan = planner.plan(0.0, BUDGET)
    planner.settle(plan, {"a": (20, 30), "long": (2900, 100)}, 0.0)
    assert planner.plan(0.1, BUDGET).chunks == (Chunk("a", 20, 30),)


def test_long_chunks_are_equal_parts() -> None:
    planner, left = planner_of(), {"long": 4000}
    planner.add(request("long", 4000), 0.0)
    plan = planner.plan(0.0, BUDGET)
    assert [chunk.tokens for chunk in plan.chunks] == [2000]
    carry_out(planner, plan, left, 0.0)
    assert [chunk.tokens for chunk in planner.plan(1.0, BUDGET).chunks] == [2000]


def test_small_longs_share_a_step_only_as_a_whole() -> None:
    planner = planner_of(most_seconds=0.8)
    for number in range(20):  # a rate of shorts, so that steps are bounded
        planner.add(request(f"s{number}", 10), float(number))
        planner.remove(f"s{number}")
    for name in "abc":
        planner.add(request(name, 300), 20.0)
    tokens = [chunk.tokens for chunk in planner.plan(20.0, BUDGET).chunks]
    assert set(tokens) == {300}
    assert sum(tokens) <= 800


def test_priorities_are_strict_and_do_not_pile_up() -> None:
    planner = planner_of()
    planner.add(request("short", 10, priority=1), 0.0)
    planner.add(request("long", 1000, priority=0), 0.0)
    assert [chunk.request_id for chunk in planner.plan(0.0, BUDGET).chunks] == ["long"]
    planner.settle(StepPlan(BatchClass.LONG), {"long": (0, 1000)}, 0.0)
    assert [chunk.request_id for chunk in planner.plan(0.0, BUDGET).chunks] == ["short"]
    planner.remove("short")
    for priority in range(1000):
        planner.add(request("x", 10, priority=priority), 1.0)
        planner.remove("x")
    assert len(planner._policies) <= 17


def test_unknown_ids_are_ignored() -> None:
    planner = planner_of()
    planner.remove("nobody")
    planner.update("nobody", 5, 5, 0.0)
    planner.settle(StepPlan(BatchClass.SHORT, (Chunk("nobody", 5, 0),)), {"no": (1, 1)}, 0.0)
    assert len(planner) == 0


def test_new_numbers_change_the_class_and_not_the_place() -> None:
    planner = planner_of()
    planner.add(request("a", 3000), 0.0)
    planner.add(request("b", 20, arrival=1.0), 1.0)
    planner.update("a", 50, 2950, 2.0)
    assert (planner.shorts, planner.longs) == (2, 0)
    assert [chunk.request_id for chunk in planner.plan(2.0, BUDGET).chunks] == ["a", "b"]


def test_a_policy_that_waits_holds_everything_back() -> None:
    class Waiting:
        capabilities = Capabilities()

        def add(self, *_: object) -> None: ...

        def remove(self, *_: object) -> None: ...

        def waits_as_short(self, *_: object) -> bool:
            return True

        def next(self, now: float) -> Wait:
            return Wait(now + 1)

    planner = planner_of(make=lambda *_: Waiting())
    planner.add(request("a", 20), 0.0)
    assert planner.plan(0.0, BUDGET).chunks == ()
    assert len(planner) == 1


@given(seed=st.integers(0, 10_000), most=st.sampled_from([None, 0.1, 1.0]))
@settings(max_examples=60, deadline=None)
def test_every_token_is_planned_once_classes_are_apart_and_nobody_waits_for_ever(
    seed: int, most: float | None
) -> None:
    rng, planner = Random(seed), planner_of(most_seconds=most)
    left: dict[str, int] = {}
    now, number = 0.0, 0
    for _ in range(4000):
        if number < 40 and rng.random() < 0.4:
            left[f"r{number}"] = rng.choice([1, 30, 200, 257, 1500, 6000])
            planner.add(request(f"r{number}", left[f"r{number}"], now), now)
            number += 1
        budget = rng.choice([64, 500, BUDGET])
        plan = planner.plan(now, budget)
        assert sum(chunk.tokens for chunk in plan.chunks) <= budget
        assert all(0 < chunk.tokens <= left[chunk.request_id] for chunk in plan.chunks)
        shorts = {left[chunk.request_id] <= 256 for chunk in plan.chunks}
        assert len(shorts) < 2
        if rng.random() < 0.1:
            planner.settle(plan, {}, now)  # no memory
            now += 0.001
        else:
            now = carry_out(planner, plan, left, now)
        if rng.random() < 0.02 and left:
            gone = rng.choice(list(left))
            planner.remove(gone)
            left[gone] = 0
        if number == 40 and not any(left.values()):
            break
    assert not any(left.values())
    assert len(planner) == 0


def test_tokens_of_a_step_are_the_inverse_of_the_cost() -> None:
    cost = CostModel(PROFILE)
    length = StepLength(cost)
    for history in (0, 5000):
        for seconds in (0.1, 0.5, 3.0):
            tokens = length.tokens(seconds, history)
            assert tokens is not None
            found = cost.seconds(Batch(BatchClass.LONG, (Chunk("a", tokens, history, False),)))
            assert found == pytest.approx(seconds, abs=2e-3)
    assert length.tokens(inf, 0) is None
    assert length.tokens(0.0, 0) == 32


def test_steps_are_long_where_shorts_are_rare_and_short_where_they_are_many() -> None:
    def seconds(rate: float, longs: int = 1) -> float:
        length = StepLength(CostModel(PROFILE))
        for number in range(100):
            length.short_arrived(number / rate)
        return length.seconds(100 / rate, longs)

    assert StepLength(CostModel(PROFILE)).seconds(0.0, 1) == inf
    assert seconds(0.01) > seconds(0.1) > seconds(1.0)
    assert seconds(0.1, longs=9) == pytest.approx(3 * seconds(0.1), rel=0.01)


def test_small_steps_take_only_of_what_the_machine_has_to_spare() -> None:
    length = StepLength(CostModel(PROFILE))
    assert length.overhead(0.0) == MOST_OVERHEAD
    for number in range(600):
        length.ran(number * 0.5, 0.5, long=False)
    assert length.overhead(300.0) == LEAST_OVERHEAD
    for number in range(600, 1200):
        length.ran(number * 0.5, 0.2, long=False)
    assert length.overhead(600.0) == pytest.approx(0.12, rel=0.05)


def test_longs_keep_all_of_the_spare_time_if_they_are_given_it() -> None:
    length = StepLength(CostModel(PROFILE), spare_share=0.0)
    assert length.overhead(0.0) == LEAST_OVERHEAD


def leaving() -> StepPlanner:
    """A planner for steps that can be left, with a long step under way."""
    planner = planner_of(interruptible=True, layers=30)
    planner.add(request("long", 3000), 0.0)
    plan = planner.plan(0.0, BUDGET)
    assert [chunk.tokens for chunk in plan.chunks] == [BUDGET]
    planner.settle(plan, {"long": (3000 - BUDGET, BUDGET)}, 0.0)
    return planner


RUNNING = Batch(BatchClass.LONG, (Chunk("long", BUDGET, 0, False),))


def test_a_step_that_can_be_left_has_the_whole_budget_though_shorts_come() -> None:
    planner = planner_of(interruptible=True)
    for number in range(20):
        planner.add(request(f"short{number}", 20, arrival=number), float(number))
        planner.remove(f"short{number}")
    planner.add(request("long", 3000, arrival=20), 20.0)
    assert [chunk.tokens for chunk in planner.plan(20.0, BUDGET).chunks] == [BUDGET]


def test_shorts_run_inside_a_step_that_can_be_left_and_longs_do_not() -> None:
    planner = leaving()
    assert planner.nested(0.1, RUNNING) is None
    planner.add(request("second", 3000, arrival=0.2), 0.2)
    assert planner.nested(0.2, RUNNING) is None
    planner.add(request("short", 30, arrival=0.3), 0.3)
    plan = planner.nested(0.31, RUNNING)
    assert plan is not None
    assert [(chunk.request_id, chunk.tokens) for chunk in plan.chunks] == [("short", 30)]
    planner.settle(plan, {"short": (0, 30)}, 0.31)
    assert set(planner.known) == {"long", "second"}


def test_what_is_left_of_a_long_counts_when_its_step_has_ended() -> None:
    planner = planner_of(interruptible=True)
    planner.add(request("long", 3000), 0.0)
    plan = planner.plan(0.0, BUDGET)
    planner.settle(plan, {"long": (3000 - BUDGET, BUDGET)}, 0.0)
    planner.ended(plan, 2.0)
    rest = planner.plan(2.0, BUDGET)
    assert rest.chunks == (Chunk("long", 3000 - BUDGET, BUDGET, True),)
    planner.settle(rest, {"long": (0, 3000)}, 2.0)
    assert set(planner.known) == {"long"}
    planner.ended(rest, 3.0)
    assert not planner.known


def test_express_work_inside_long_steps_keeps_to_its_share() -> None:
    """Shorts without end get half of the time, and a burst, while the long lasts."""
    planner, now, express = leaving(), 0.0, 0.0
    for number in range(2000):
        planner.add(request(f"short{number}", 100, arrival=now), now)
        plan = planner.nested(now, RUNNING)
        if plan is None:
            now += 0.05  # a layer
            continue
        planner.settle(plan, {c.request_id: (0, c.tokens) for c in plan.chunks}, now)
        batch = Batch(plan.kind, plan.chunks)
        seconds = CostModel(PROFILE).seconds(batch)
        now += seconds
        express += seconds
        planner.finished(plan, batch, seconds, now)
    assert 0.4 * now < express < 0.6 * now


def test_nothing_of_a_less_urgent_priority_runs_inside_a_step() -> None:
    planner = leaving()
    planner.add(request("later", 30, arrival=0.1, priority=5), 0.1)
    assert planner.nested(0.2, RUNNING) is None
    planner.add(request("now", 30, arrival=0.2, priority=-1), 0.2)
    plan = planner.nested(0.3, RUNNING)
    assert plan is not None
    assert plan.priority == -1


def test_without_a_step_that_can_be_left_nothing_is_nested() -> None:
    planner = planner_of(interruptible=True)
    planner.add(request("short", 30), 0.0)
    assert planner.nested(0.0, RUNNING) is None


def test_streams_take_a_seventh_of_the_time_inside_long_work() -> None:
    planner = planner_of(interruptible=True)
    step = CostModel(PROFILE).seconds(
        Batch(BatchClass.DECODE, decodes=tuple(Chunk(f"s{n}", 1, 100, False) for n in range(8)))
    )
    assert planner.token_seconds(8, 800) == pytest.approx(7 * step, rel=0.05)
