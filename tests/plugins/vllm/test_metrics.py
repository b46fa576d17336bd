"""Metrics by class, from what vLLM's statistics carry to the API server."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

from pla_serve.plugins.vllm_metrics import ClassMetrics

OURS = "pla_serve.plugins.vllm.LengthAwareScheduler"


def config_of(scheduler: object) -> Any:
    return SimpleNamespace(scheduler_config=SimpleNamespace(scheduler_cls=scheduler))


@pytest.fixture
def metrics() -> Any:
    made = ClassMetrics(config_of(OURS), [0])
    yield made
    for collector in (made._waiting, made._limit, made._nested, made._ttft):
        REGISTRY.unregister(collector)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"pla_serve:{name}", {"engine": "0"} | labels)


def finished(prompt: int, cached: int, queued: float, prefill: float) -> FinishedRequestStats:
    return FinishedRequestStats(
        finish_reason=None,  # type: ignore[arg-type]
        num_prompt_tokens=prompt,
        num_cached_tokens=cached,
        queued_time=queued,
        prefill_time=prefill,
    )


def test_queues_arrive_and_are_taken_out_of_the_field_they_travelled_in(metrics: Any) -> None:
    stats = SchedulerStats()
    stats.num_kv_fetch_reqs_by_stage = {
        "waiting_to_start": 1,
        "pla_serve:short": 3,
        "pla_serve:long": 2,
        "pla_serve:boundary": 400,
        "pla_serve:nested": 7,
    }
    metrics.record(stats, None)
    assert value("prefills_unfinished", **{"class": "short"}) == 3
    assert value("prefills_unfinished", **{"class": "long"}) == 2
    assert value("boundary_tokens") == 400
    assert value("nested_steps") == 7
    assert stats.num_kv_fetch_reqs_by_stage == {"waiting_to_start": 1}


def test_first_tokens_count_by_uncached_tokens(metrics: Any) -> None:
    stats = IterationStats()
    stats.finished_requests = [finished(3000, 2990, 0.5, 0.25), finished(3000, 0, 2.0, 6.0)]
    metrics.record(None, stats)
    assert value("time_to_first_token_seconds_sum", **{"class": "short"}) == 0.75
    assert value("time_to_first_token_seconds_sum", **{"class": "long"}) == 8.0


@pytest.mark.parametrize("scheduler", [None, "vllm.v1.core.sched.scheduler.Scheduler"])
def test_another_scheduler_registers_nothing(scheduler: str | None) -> None:
    made = ClassMetrics(config_of(scheduler), [0])
    made.record(SchedulerStats(), IterationStats())
    assert value("boundary_tokens") is None
