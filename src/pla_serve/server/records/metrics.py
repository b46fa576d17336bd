"""Prometheus metrics in a registry of their own; vLLM's names where the meaning is the same."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
)

from pla_serve.server.records.latencies import RecentLatencies
from pla_serve.server.records.tier_metrics import TierMetrics
from pla_serve.server.records.transfer_metrics import TransferMetrics
from pla_serve.wire.engine import EngineReady, EngineStats, FinishReason, Rejected

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8),
    *(1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
)
TOKEN_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    1,
    5,
)
LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

GAUGES = {
    "vllm:num_requests_running": "Requests that compute or decode.",
    "vllm:num_requests_waiting": "Requests that wait for their prefill, or for KV memory.",
    "vllm:kv_cache_usage_perc": "Share of KV blocks held by requests, 0 to 1.",
    "pla_serve:waiting_tokens": "New tokens that wait to be prefilled.",
    "pla_serve:queued_seconds": "Predicted time to prefill all that waits.",
    "pla_serve:requests_parked": "Requests that wait for KV memory.",
    "pla_serve:kv_cached_tokens": "Tokens whose KV is kept for reuse.",
    "pla_serve:boundary_tokens": "At most this many new tokens count as short.",
    "pla_serve:cost_model_error": "Median relative error of the cost model's recent predictions.",
    "pla_serve:warming_up": "1 while a warm-up goes on behind requests.",
    "pla_serve:layers": "Decoder layers of the model.",
    "pla_serve:kv_tokens": "Tokens whose KV fits in memory.",
    "pla_serve:kv_bytes_per_token": "Bytes of KV of one token, over all layers.",
    "pla_serve:engine_up": "1 while the engine takes requests.",
    "pla_serve:http_requests_in_flight": "Requests of clients and routers not yet answered.",
}
COUNTERS = {
    "vllm:prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the cache."),
    "vllm:prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the cache."),
    "vllm:prompt_tokens": ("prompt_tokens", "Prompt tokens of requests whose prefill completed."),
    "vllm:generation_tokens": ("generation_tokens", "Tokens generated."),
    "vllm:num_preemptions": ("recompute_preemptions", "Requests recomputed for want of KV memory."),
    "pla_serve:express_batches": ("express_batches", "Batches run at a layer boundary of another."),
    "pla_serve:offline_tokens": (
        "offline_tokens",
        "Tokens of prompts and outputs of offline batches, computed in time that others left.",
    ),
    "pla_serve:offline_seconds": ("offline_seconds", "Time in which offline batches ran."),
    "pla_serve:idle_seconds": ("idle_seconds", "Time in which nothing ran."),
    "pla_serve:steps_ahead": (
        "steps_ahead",
        "Batches enqueued before the tokens of the one before them were known.",
    ),
    "pla_serve:graph_tokens": ("graph_tokens", "Tokens computed in captured shapes."),
    "pla_serve:graph_padding": ("graph_padding", "Padding computed in captured shapes."),
    "pla_serve:compile_failures": (
        "compile_failures",
        "Times that compiled layers were given up for eager ones.",
    ),
}
"""Name to field of `EngineStats` and help."""


class Metrics:
    """One object a server; implements the engine client's observer."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.latencies = RecentLatencies()
        """TTFT and ITL of the last seconds, for the page at ``/ui``."""
        self._label = {"model_name": model_name}
        self._gauges = {name: self._make(Gauge, name, text) for name, text in GAUGES.items()}
        self._counters = {
            name: self._make(Counter, name, text) for name, (_, text) in COUNTERS.items()
        }
        self._make_batches()
        self._make_outcomes()
        self._make_predictions()
        self._transfer = TransferMetrics(self.registry, self._label)
        self.tiers = TierMetrics(self.registry, self._label)
        self._make_histograms()
        self._kernels = self._make(
            Info, "pla_serve:cpu_kernels", "Level of the kernels that the engine computes with."
        )
        self._profile = self._make(
            Info, "pla_serve:cost_profile", "Where the first predictions of the engine come from."
        )
        self._quantised = self._family(
            Gauge,
            "pla_serve:quantised_weight_bytes",
            "Bytes of weights that stay quantised, by format.",
            "format",
        )
        self._seen: EngineStats | None = None

    def _make_batches(self) -> None:
        self._waiting = self._family(
            Gauge, "pla_serve:requests_waiting", "Queue depth by class.", "class"
        )
        self._batches = self._family(
            Counter, "pla_serve:batches", "Batches computed, by class.", "class"
        )
        self._replays = self._family(
            Counter,
            "pla_serve:graph_replays",
            "Batches on captured shapes, by shape.",
            "shape",
        )
        self._fallbacks = self._family(
            Counter,
            "pla_serve:graph_fallbacks",
            "Batches run on the ordinary kernels although shapes are captured, by reason.",
            "reason",
        )
        self._steps_waited = self._family(
            Counter,
            "pla_serve:steps_waited",
            "Batches whose end was waited for before the next was enqueued, by reason.",
            "reason",
        )

    def _make_outcomes(self) -> None:
        self._rejected = self._family(
            Counter, "pla_serve:requests_rejected", "Requests refused, by reason.", "reason"
        )
        for reason in ("capacity", "request"):
            self._by(self._rejected, reason)  # shown as 0 before the first one
        self._success = self._family(
            Counter,
            "vllm:request_success",
            "Choices that ended, by reason; abort: the client left, or read too slowly.",
            "finished_reason",
        )
        for reason in ("stop", "length", "abort", "error"):
            self._by(self._success, reason)
        self._restarts = self._make(
            Counter, "pla_serve:engine_restarts", "Engine processes started again."
        )

    def _make_predictions(self) -> None:
        self._cost = self._family(
            Gauge,
            "pla_serve:cost_seconds",
            "What the cost model holds one unit of work to take: a token, a unit of attention "
            "(new tokens times history and half of themselves), a KV token read, a sequence, a "
            "launch.",
            "per",
        )
        self._wait_error = self._family(
            Gauge,
            "pla_serve:predicted_wait_error",
            "Median relative error of recent predictions of the time to first token, by class.",
            "class",
        )
        self._wait_coverage = self._family(
            Gauge,
            "pla_serve:predicted_wait_coverage",
            "Share of recent first tokens that came by what was predicted for 90 in 100, by class.",
            "class",
        )

    def _make_histograms(self) -> None:
        self._ttft = self._make(
            Histogram, "vllm:time_to_first_token_seconds", "Arrival to first token.", SECONDS
        )
        self._itl = self._make(
            Histogram, "vllm:inter_token_latency_seconds", "Between tokens.", TOKEN_SECONDS
        )
        self._e2e = self._make(
            Histogram, "vllm:e2e_request_latency_seconds", "Arrival to last token.", SECONDS
        )
        self._queue = self._make(
            Histogram, "vllm:request_queue_time_seconds", "Arrival to first batch.", SECONDS
        )
        self._lag = self._make(
            Histogram,
            "pla_serve:event_loop_lag_seconds",
            "How late the event loop ran a timer: how long one step of the server held it.",
            LAG_SECONDS,
        )
        by_class = Histogram(
            "pla_serve:time_to_first_token_seconds",
            "Arrival to first token in the engine, by class on arrival.",
            ["model_name", "class"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self._class_ttft = {
            short: by_class.labels(**self._label, **{"class": "short" if short else "long"})
            for short in (True, False)
        }

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def set(self, gauge: str, value: float) -> None:
        self._gauges[gauge].set(value)

    def ready(self, info: EngineReady) -> None:
        self._seen = None  # a new process counts from zero
        self._transfer.restarted()
        self.set("pla_serve:engine_up", 1)
        self.set("pla_serve:layers", info.layers)
        if info.cpu_kernels:
            self._kernels.info({"level": info.cpu_kernels})
        if info.cost_profile:
            self._profile.info({"source": info.cost_profile})
        for name, size in info.quantised.items():
            self._by(self._quantised, name).set(size)
        self.set("pla_serve:kv_tokens", info.kv_tokens)
        self.set("pla_serve:kv_bytes_per_token", info.kv_bytes_per_token)

    def alive(self) -> None:
        """Nothing to count."""

    def lost(self, reason: str) -> None:
        self.set("pla_serve:engine_up", 0)
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            self.set(name, 0)

    def restarted(self) -> None:
        self._restarts.inc()

    def stats(self, stats: EngineStats) -> None:
        load = stats.load
        for name, value in {
            "vllm:num_requests_running": load.running,
            "vllm:num_requests_waiting": load.waiting,
            "vllm:kv_cache_usage_perc": load.kv_usage,
            "pla_serve:waiting_tokens": load.waiting_tokens,
            "pla_serve:queued_seconds": load.queued_seconds,
            "pla_serve:requests_parked": load.parked,
            "pla_serve:kv_cached_tokens": load.kv_cached_tokens,
            "pla_serve:boundary_tokens": load.boundary_tokens,
            "pla_serve:cost_model_error": stats.cost_error,
            "pla_serve:warming_up": stats.warming_up,
        }.items():
            self.set(name, value)
        if load.cost is not None:
            for unit, seconds in asdict(load.cost).items():
                self._by(self._cost, unit.removeprefix("per_")).set(seconds)
        self._by(self._waiting, "short").set(load.short_waiting)
        self._by(self._waiting, "long").set(load.long_waiting)
        for kind, error in stats.wait_error.items():
            self._by(self._wait_error, kind).set(error)
        for kind, share in stats.wait_coverage.items():
            self._by(self._wait_coverage, kind).set(share)
        self._transfer.stats(stats.transfer)
        self._count(stats)
        for sample in stats.firsts:
            self._class_ttft[sample.short].observe(sample.ttft)
            self._queue.observe(sample.queue)

    def loop_lag(self, seconds: float) -> None:
        self._lag.observe(seconds)

    def first_token(self, seconds: float, new_tokens: int) -> None:
        """Count the first token of a choice whose prompt had ``new_tokens`` to compute."""
        self._ttft.observe(seconds)
        self.latencies.first_token(seconds, new_tokens)

    def next_tokens(self, seconds_each: float, new_tokens: int) -> None:
        """Count tokens of a choice that came together; ``new_tokens`` as for the first one."""
        self._itl.observe(seconds_each)
        self.latencies.next_tokens(seconds_each, new_tokens)

    def finished(self, reason: FinishReason, seconds: float) -> None:
        self._by(self._success, reason).inc()
        self._e2e.observe(seconds)

    def unfinished(self, reason: FinishReason, choices: int) -> None:
        """Count choices that ended before their last token; they have no latency to observe."""
        self._by(self._success, reason).inc(choices)

    def rejected(self, rejected: Rejected) -> None:
        self._by(self._rejected, "capacity" if rejected.retry_after else "request").inc()

    def _count(self, stats: EngineStats) -> None:
        """The engine sends totals since its start; only what is new is added."""
        seen, self._seen = self._seen, stats
        for name, (field, _) in COUNTERS.items():
            self._counters[name].inc(max(0, getattr(stats, field) - getattr(seen, field, 0)))
        for family, name in (
            (self._batches, "batches"),
            (self._replays, "graph_replays"),
            (self._fallbacks, "graph_fallbacks"),
            (self._steps_waited, "steps_waited"),
        ):
            before = getattr(seen, name, {})
            for label, total in getattr(stats, name).items():
                self._by(family, label).inc(max(0, total - before.get(label, 0)))

    def _make(self, kind: Any, name: str, text: str, buckets: tuple[float, ...] = ()) -> Any:
        extra = {"buckets": buckets} if buckets else {}
        metric = kind(name, text, ["model_name"], registry=self.registry, **extra)
        return metric.labels(**self._label)

    def _family(self, kind: Any, name: str, text: str, label: str) -> Any:
        return kind(name, text, ["model_name", label], registry=self.registry)

    def _by(self, family: Any, value: str) -> Any:
        return family.labels(self._label["model_name"], value)
