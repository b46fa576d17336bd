"""What /metrics says."""

from __future__ import annotations

import re

import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from pla_serve.fleet.router.metrics import FleetMetrics
from pla_serve.policy.cost import CostProfile
from pla_serve.server.records.metrics import Metrics
from pla_serve.wire.engine import EngineLoad, EngineReady, EngineStats, LatencySample, TransferStats
from tests.server.fake_core import VOCAB
from tests.server.server_harness import MODEL, ROOT, Live, until

READY = EngineReady(
    max_model_len=8,
    kv_tokens=8,
    kv_bytes_per_token=64,
    layers=2,
    vocab_size=VOCAB,
    device="x",
    dtype="x",
    policy="fcfs",
)
STATS = EngineStats(
    load=EngineLoad(
        short_waiting=1,
        long_waiting=2,
        running=3,
        parked=4,
        waiting_tokens=5,
        queued_short_seconds=1.0,
        queued_long_seconds=5.0,
        kv_usage=0.7,
        kv_cached_tokens=8,
        boundary_tokens=16,
        cost=CostProfile(per_token=1e-3, per_launch=0.02),
    ),
    prefix_queries=90,
    prefix_hits=10,
    prompt_tokens=11,
    generation_tokens=12,
    batches={"short": 13},
    express_batches=14,
    recompute_preemptions=15,
    cost_error=0.17,
    wait_error={"short": 0.3, "long": 0.2},
    wait_coverage={"short": 0.91, "long": 0.88},
    steps_ahead=17,
    steps_waited={"grammar": 2},
    firsts=[LatencySample(True, 0.1, 0.2), LatencySample(False, 1.0, 2.0)],
)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {"model_name": "m", **labels})


def test_gauges_are_taken_as_they_are() -> None:
    metrics = Metrics("m")
    metrics.ready(READY)
    metrics.stats(STATS)
    assert value(metrics, "vllm:num_requests_running") == 3
    assert value(metrics, "vllm:num_requests_waiting") == 7
    assert value(metrics, "pla_serve:requests_waiting", **{"class": "long"}) == 2
    assert value(metrics, "vllm:kv_cache_usage_perc") == 0.7
    assert value(metrics, "pla_serve:boundary_tokens") == 16
    assert value(metrics, "pla_serve:cost_seconds", per="launch") == 0.02
    assert value(metrics, "pla_serve:predicted_wait_error", **{"class": "short"}) == 0.3
    assert value(metrics, "pla_serve:predicted_wait_coverage", **{"class": "long"}) == 0.88
    assert value(metrics, "pla_serve:layers") == 2
    assert value(metrics, "pla_serve:kv_tokens") == 8
    assert value(metrics, "pla_serve:kv_bytes_per_token") == 64
    assert value(metrics, "pla_serve:cpu_kernels_info", level="avx2") is None
    metrics.ready(msgspec.structs.replace(READY, cpu_kernels="avx2"))
    assert value(metrics, "pla_serve:cpu_kernels_info", level="avx2") == 1


def test_totals_go_on_over_a_restart() -> None:
    metrics = Metrics("m")
    metrics.ready(READY)
    metrics.stats(STATS)
    metrics.stats(msgspec.structs.replace(STATS, prefix_hits=25, batches={"short": 14, "long": 1}))
    assert value(metrics, "vllm:prefix_cache_hits_total") == 25
    assert value(metrics, "pla_serve:steps_ahead_total") == 17
    assert value(metrics, "pla_serve:steps_waited_total", reason="grammar") == 2
    metrics.lost("killed")
    assert value(metrics, "pla_serve:engine_up") == 0
    assert value(metrics, "vllm:num_requests_running") == 0
    metrics.ready(READY)
    metrics.stats(msgspec.structs.replace(STATS, prefix_hits=5, batches={"long": 2}))
    assert value(metrics, "vllm:prefix_cache_hits_total") == 30
    assert value(metrics, "pla_serve:batches_total", **{"class": "long"}) == 3
    assert value(metrics, "pla_serve:batches_total", **{"class": "short"}) == 14


def test_first_tokens_are_counted_by_class() -> None:
    metrics = Metrics("m")
    metrics.stats(STATS)
    name = "pla_serve:time_to_first_token_seconds"
    assert value(metrics, f"{name}_sum", **{"class": "short"}) == 0.2
    assert value(metrics, f"{name}_sum", **{"class": "long"}) == 2.0
    assert value(metrics, "vllm:request_queue_time_seconds_count") == 2


def test_served_requests_show_up(live: Live) -> None:
    before = live.metric("vllm:request_success_total", finished_reason="stop")
    answer = httpx.post(f"{live.url}/v1/completions", json={"prompt": "abc"})
    assert answer.status_code == 200
    assert live.metric("vllm:request_success_total", finished_reason="stop") == before + 1
    until(lambda: live.metric("vllm:generation_tokens_total") >= 4)
    text = httpx.get(f"{live.url}/metrics").text
    assert f'vllm:time_to_first_token_seconds_count{{model_name="{MODEL}"}}' in text
    assert "python_gc" not in text  # no global registry


def test_kv_transfer_counts_early_and_late() -> None:
    metrics = Metrics("m")
    metrics.ready(READY)
    moved = TransferStats(
        offers=1, reserved=2, taken_over=3, recomputed=1, expired=0,
        bytes_read=100, bytes_early=60, read_seconds=0.5,
    )  # fmt: skip
    metrics.stats(msgspec.structs.replace(STATS, transfer=moved))
    metrics.stats(
        msgspec.structs.replace(
            STATS, transfer=msgspec.structs.replace(moved, bytes_read=150, taken_over=4)
        )
    )
    text = metrics.render().decode()
    assert 'pla_serve:kv_read_bytes_total{model_name="m",when="early"} 60.0' in text
    assert 'pla_serve:kv_read_bytes_total{model_name="m",when="late"} 90.0' in text
    assert 'pla_serve:kv_transfers_total{model_name="m",outcome="taken_over"} 4.0' in text
    # A new engine process counts from zero.
    metrics.ready(READY)
    metrics.stats(
        msgspec.structs.replace(
            STATS, transfer=msgspec.structs.replace(moved, bytes_read=10, bytes_early=10)
        )
    )
    text = metrics.render().decode()
    assert 'pla_serve:kv_read_bytes_total{model_name="m",when="early"} 70.0' in text


def exported(registry: CollectorRegistry) -> set[str]:
    """Names of all families as a scrape shows them."""
    endings = {"counter": "_total", "info": "_info"}
    return {each.name + endings.get(each.type, "") for each in registry.collect()}


OF_SERVERS = exported(Metrics("m").registry)


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("api.md", OF_SERVERS),
        ("fleet.md", exported(FleetMetrics("m").registry) - OF_SERVERS),
    ],
)
def test_the_docs_have_every_metric(page: str, names: set[str]) -> None:
    rows = re.findall(
        r"^\| (`.*?) \| (?:gauge|counter|histogram|info) \|", _text(page), re.MULTILINE
    )
    documented = [name for row in rows for name in re.findall(r"`(\w+:\w+)`", row)]
    assert sorted(documented) == sorted(names)


def _text(page: str) -> str:
    return (ROOT / "docs" / page).read_text()
