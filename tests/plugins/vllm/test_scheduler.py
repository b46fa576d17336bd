"""vLLM's real scheduler and KV blocks, no model, a clock of our own."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import MagicMock

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from pla_serve.plugins.vllm import LengthAwareScheduler
from tests.plugins.vllm.harness import BLOCK, Engine, make_request, make_scheduler

LONG, SHORT = 3000, 40


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(make_scheduler(LengthAwareScheduler, tmp_path))


def engine_of(folder: Path, depth: int = 1, **settings: Any) -> Engine:
    return Engine(make_scheduler(LengthAwareScheduler, folder, **settings), depth=depth)


def warm(engine: Engine, shorts: int = 12) -> None:
    """Traffic from which rates and costs are known."""
    for number in range(shorts):
        engine.add(make_request(f"warm{number}", 30 + 17 * number, answer=1))
        engine.drain()
        engine.clock.now += 0.5
    engine.steps.clear()


def prefills(step: dict[str, int]) -> dict[str, int]:
    return {name: tokens for name, tokens in step.items() if tokens > 1}


def test_a_short_goes_before_the_rest_of_a_long_that_runs(engine: Engine) -> None:
    engine.add(make_request("long", 6000))
    assert prefills(engine.step()) == {"long": 2000}
    engine.add(make_request("short", SHORT))
    assert engine.step() == {"short": SHORT}
    assert "long" in engine.step()
    engine.drain()
    assert engine.tokens == {"long": 4, "short": 4}
    assert engine.first["short"] < engine.first["long"]


def test_a_long_that_stands_still_keeps_its_place_and_its_memory(engine: Engine) -> None:
    scheduler = engine.scheduler
    long = make_request("long", 6000)
    engine.add(long)
    engine.step()
    held, free = long.num_computed_tokens, scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    before = free()
    engine.add(make_request("short", BLOCK))
    assert "long" not in engine.step()
    assert long.status == RequestStatus.RUNNING
    assert long in scheduler.running
    assert long.num_computed_tokens == held
    assert long.num_preemptions == 0
    assert before - free() <= 2


def test_without_shorts_a_long_gets_the_whole_budget(engine: Engine) -> None:
    engine.add(make_request("long", 4096))
    assert [prefills(engine.step()) for _ in range(2)] == [{"long": 2048}] * 2


def test_chunks_shrink_when_shorts_keep_coming(engine: Engine) -> None:
    warm(engine)
    engine.add(make_request("long", 4096))
    step = prefills(engine.step())
    assert step.keys() == {"long"}
    assert 32 <= step["long"] < 700


def test_a_step_is_kept_within_the_seconds_that_were_asked_for(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, additional={"pla_serve": {"step_seconds": 0.2}})
    warm(engine)
    engine.add(make_request("long", 4096, answer=1))
    engine.drain()
    sizes = [step["long"] for step in engine.steps if "long" in step]
    seconds = [engine.launch + engine.per_token * size for size in sizes]
    assert max(seconds) < 0.25
    assert len(sizes) > 20


def test_costs_are_learnt_from_the_time_that_steps_take(engine: Engine) -> None:
    warm(engine, shorts=30)
    cost = engine.scheduler.planner._cost
    assert cost.error() < 0.1
    assert cost.prefill_seconds(300, 0) == pytest.approx(0.04 + 0.3, rel=0.1)


def test_costs_are_learnt_with_two_steps_in_flight(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, depth=2)
    for number in range(40):
        engine.add(make_request(f"r{number}", 30 + 13 * number, answer=2))
        engine.step()
        engine.step()
    engine.drain()
    assert engine.scheduler.planner._cost.error() < 0.1


def test_what_is_left_counts_not_the_length_of_the_prompt(tmp_path: Path) -> None:
    engine = engine_of(tmp_path)
    ids = [(7 * i) % 1000 for i in range(4000)]
    engine.add(make_request("first", ids[:3968], answer=1))
    engine.drain()
    engine.add(make_request("other", LONG), make_request("again", ids, answer=1))
    planner = engine.scheduler.planner
    step = engine.step()
    assert step == {"again": 32}
    assert planner.longs == 1


def test_eviction_while_it_waits_makes_a_short_long(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, seqs=1)
    scheduler = engine.scheduler
    ids = [(7 * i) % 1000 for i in range(3000)]
    engine.add(make_request("first", ids, answer=1))
    engine.drain()
    engine.add(make_request("busy", SHORT, answer=50))
    engine.step()
    engine.add(make_request("again", ids, answer=1))
    engine.step()
    assert scheduler.planner.shorts == 1
    scheduler.kv_cache_manager.block_pool.get_new_blocks(
        scheduler.kv_cache_manager.block_pool.get_num_free_blocks() - 50
    )
    evicted = scheduler.kv_cache_manager.get_computed_blocks(scheduler.requests["again"])[1]
    assert evicted < 1000
    for _ in range(3):
        engine.step()
    assert (scheduler.planner.shorts, scheduler.planner.longs) == (0, 1)


def test_a_short_that_turns_out_uncached_gets_no_more_than_was_planned(tmp_path: Path) -> None:
    """Between the plan and the step the cache may change; then it waits again, as a long."""
    engine = engine_of(tmp_path)
    scheduler = engine.scheduler
    engine.add(make_request("again", LONG))
    scheduler._cached = lambda request: LONG - 50
    assert engine.step() == {"again": 50}
    assert scheduler.planner.longs == 1


def test_aborts_in_every_state_leave_nothing_behind(tmp_path: Path) -> None:
    for depth in (1, 2):
        engine = engine_of(tmp_path, depth=depth, blocks=2000)
        scheduler = engine.scheduler
        engine.add(make_request("paused", 6000), make_request("short", SHORT, answer=30))
        engine.step()
        engine.step()
        engine.add(make_request("waiting", LONG), make_request("new", SHORT))
        scheduler.finish_requests(["nobody"], RequestStatus.FINISHED_ABORTED)
        scheduler.finish_requests(["new", "nobody", "new"], RequestStatus.FINISHED_ABORTED)
        engine.step()
        for name in ("paused", "waiting", "short"):
            scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
            if scheduler.has_unfinished_requests():
                engine.step()
        engine.drain()
        assert len(scheduler.planner) == 0
        assert len(scheduler.waiting) == 0
        assert not scheduler._came
        assert not scheduler.requests
        assert scheduler.kv_cache_manager.usage == 0


def test_all_can_be_aborted_at_once(engine: Engine) -> None:
    engine.add(*(make_request(f"r{i}", 50 * (i + 1)) for i in range(40)))
    engine.step()
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert len(engine.scheduler.planner) == 0
    assert not engine.scheduler.has_unfinished_requests()


def test_preempted_requests_are_resumed_first_and_all_end(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, blocks=40, caching=False)
    engine.add(*(make_request(f"r{i}", 150, answer=120) for i in range(4)))
    preempted = 0
    for _ in range(3000):
        if not engine.scheduler.has_unfinished_requests():
            break
        engine.step()
        urgent = engine.scheduler.waiting.urgent
        preempted = max(preempted, len(urgent))
        known = engine.scheduler.planner.known
        assert not any(request.request_id in known for request in urgent)
    assert preempted
    assert engine.tokens == {f"r{i}": 120 for i in range(4)}


def test_a_paused_long_makes_room_for_a_short_that_finds_no_memory(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, blocks=200, caching=False)
    engine.add(make_request("long", 3100, answer=1))
    engine.step()
    engine.add(make_request("short", 250, answer=1))
    engine.drain(most=50)
    assert engine.tokens == {"long": 1, "short": 1}


def test_more_requests_than_places_all_end(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, seqs=2)
    engine.add(make_request("a", LONG), make_request("b", 5000))
    engine.step()
    engine.add(*(make_request(f"s{i}", SHORT) for i in range(5)))
    engine.drain(most=200)
    assert len(engine.tokens) == 7


def test_priorities_come_before_classes(tmp_path: Path) -> None:
    engine = engine_of(tmp_path, policy="priority")
    engine.add(
        make_request("short", SHORT, priority=5),
        make_request("long", LONG, priority=1),
        make_request("urgent", LONG, priority=-3),
    )
    engine.drain()
    assert engine.first["urgent"] < engine.first["long"] < engine.first["short"]


def test_priorities_count_for_nothing_unless_vllm_schedules_by_them(engine: Engine) -> None:
    engine.add(make_request("long", LONG, priority=-3), make_request("short", SHORT, priority=5))
    assert engine.step() == {"short": SHORT}


def test_a_grammar_is_awaited_without_holding_up_others(engine: Engine) -> None:
    scheduler = engine.scheduler
    request = make_request("json", SHORT, grammar=True)
    grammar: Future[Any] = Future()
    request.structured_output_request.grammar = grammar
    engine.add(request, make_request("long", LONG, answer=8))
    assert "json" not in engine.step()
    assert len(scheduler.waiting) == 1
    grammar.set_result(_AnyText())
    assert "json" in engine.step()


def test_a_grammar_that_does_not_compile_ends_its_request(engine: Engine) -> None:
    request = make_request("json", SHORT, grammar=True)
    grammar: Future[Any] = Future()
    grammar.set_exception(ValueError("no such grammar"))
    request.structured_output_request.grammar = grammar
    engine.add(request)
    engine.drain(most=10)
    assert request.status == RequestStatus.FINISHED_ERROR
    assert len(engine.scheduler.planner) == 0


def test_a_prompt_whose_kv_comes_from_elsewhere_is_short(engine: Engine) -> None:
    request = make_request("remote", LONG)
    request.kv_transfer_params = {"do_remote_prefill": True}
    assert engine.scheduler._cached(request) == LONG - 1


def test_pausing_stops_everything_and_loses_nothing(engine: Engine) -> None:
    scheduler = engine.scheduler
    engine.add(make_request("long", 6000), make_request("short", SHORT))
    engine.step()
    for state in (PauseState.PAUSED_ALL, PauseState.PAUSED_NEW):
        scheduler.set_pause_state(state)
        engine.step()
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert engine.step() == {}
    scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()
    assert engine.tokens == {"long": 4, "short": 4}


def test_resetting_the_prefix_cache_preempts_and_all_end(engine: Engine) -> None:
    engine.add(make_request("long", 6000), make_request("short", SHORT, answer=20))
    engine.step()
    engine.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    engine.drain()
    assert engine.tokens == {"long": 4, "short": 20}


def test_stats_tell_what_waits_by_class(engine: Engine) -> None:
    engine.add(make_request("a", LONG), make_request("b", LONG), make_request("c", SHORT))
    engine.step()
    stats = engine.scheduler.make_stats().num_kv_fetch_reqs_by_stage
    assert stats["pla_serve:long"] == 2
    assert stats["pla_serve:short"] == 0
    assert stats["pla_serve:boundary"] >= 256


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_any_traffic_is_served_once_and_classes_are_apart(
    tmp_path: Path, seed: int, depth: int
) -> None:
    rng = Random(seed)
    tight = seed % 2 == 1
    engine = engine_of(
        tmp_path,
        depth,
        blocks=420 if tight else 10_000,
        seqs=rng.choice([3, 16]),
        budget=rng.choice([256, 2048]),
        caching=rng.random() < 0.5,
        policy=rng.choice(["fcfs", "priority"]),
    )
    wanted: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for number in range(60):
        name = f"r{number}"
        sizes[name] = rng.choice([1, 17, 60, 250, 900, 4000])
        wanted[name] = rng.randint(1, 12)
        engine.add(
            make_request(name, sizes[name], answer=wanted[name], priority=rng.choice([0, 0, 1]))
        )
        for _ in range(rng.randint(0, 4)):
            if engine.scheduler.has_unfinished_requests():
                engine.step()
        if rng.random() < 0.1:
            gone = rng.choice(list(wanted))
            if gone in engine.scheduler.requests:
                wanted.pop(gone)
            engine.scheduler.finish_requests([gone], RequestStatus.FINISHED_ABORTED)
    engine.drain()
    assert {name: engine.tokens[name] for name in wanted} == wanted
    assert len(engine.scheduler.planner) == 0
    assert engine.scheduler.kv_cache_manager.usage == 0
    if not tight and engine.scheduler.max_num_running_reqs > 3:
        for step in engine.steps:
            kinds = {sizes[name] > 1024 for name in step if step[name] > 1}
            assert len(kinds) < 2 or min(sizes[name] for name in prefills(step)) > 250


def test_shorts_alone_run_in_the_steps_of_vllm(tmp_path: Path) -> None:
    found = []
    for kind in (AsyncScheduler, LengthAwareScheduler):
        rng = Random(3)
        engine = Engine(make_scheduler(kind, tmp_path, budget=512, seqs=8))
        for number in range(50):
            engine.add(make_request(f"r{number}", rng.randint(1, 200), answer=rng.randint(1, 9)))
            if rng.random() < 0.7:
                engine.step()
        engine.drain()
        found.append(engine.steps)
    assert found[0] == found[1]


class _AnyText:
    """A grammar that takes everything."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def is_terminated(self) -> bool:
        return False

    def fill_bitmask(self, *_: Any) -> None:
        pass


def test_a_connector_that_loads_kv_takes_the_request_out_of_the_plan(engine: Engine) -> None:
    """It waits for its KV as vLLM has it; the rest of its prefill is planned when it is back."""
    scheduler = engine.scheduler
    connector = scheduler.connector = MagicMock()
    connector.supports_divergent_local_hybrid_hits = False
    connector.has_pending_block_frees.return_value = False
    connector.get_num_new_matched_tokens.side_effect = lambda request, _: (
        (640, True) if request.request_id == "remote" else (0, False)
    )
    connector.get_loaded_kv_cache_group_ids.return_value = ()
    connector.get_kv_connector_stats.return_value = None
    connector.take_events.return_value = ()
    connector.request_finished.return_value = (False, None)
    connector.get_external_cache_hit_sources.return_value = None
    connector.has_pending_push_work.return_value = False
    remote = make_request("remote", 1000, answer=2)
    engine.add(remote, make_request("short", SHORT, answer=6))
    engine.step()
    for _ in range(3):
        engine.step()
    assert remote.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert "remote" not in scheduler.planner.known
    assert len(scheduler.kv_holding_waiting) == 1
    scheduler.finished_recving_kv_req_ids.add("remote")
    engine.drain(most=40)
    assert engine.tokens == {"remote": 2, "short": 6}
    assert sum(step.get("remote", 0) for step in engine.steps) == 360 + 1
