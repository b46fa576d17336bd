"""Metrics by class on vLLM's own ``/metrics``, as a plugin of its statistics.

vLLM finds it by the entry point that this package declares, in the process of the API server. It
stands apart from `plugins.vllm`, whose import asks for a vLLM of the right version: whoever does
not use the scheduler must not hear of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats

SCHEDULER = "LengthAwareScheduler"
PREFIX = "pla_serve:"
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0)
BOUNDARY = 256
"""Tokens, until the scheduler has told its own."""
LABELS = ("engine",)


class ClassMetrics(AggregateStatLoggerBase):
    """Prefills that wait, and times to first tokens, of shorts and longs.

    Registers nothing unless ``--scheduler-cls`` names this project's scheduler.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        self._on = SCHEDULER in str(vllm_config.scheduler_config.scheduler_cls)
        self._boundary = dict.fromkeys(engine_indexes, BOUNDARY)
        if not self._on:
            return
        self._waiting = Gauge(
            f"{PREFIX}prefills_unfinished",
            "Prefills that wait or are under way, by class.",
            (*LABELS, "class"),
            multiprocess_mode="mostrecent",
        )
        self._limit = Gauge(
            f"{PREFIX}boundary_tokens",
            "Most uncached prompt tokens that count as short.",
            LABELS,
            multiprocess_mode="mostrecent",
        )
        self._nested = Gauge(
            f"{PREFIX}nested_steps",
            "Steps that have run between two layers of another one, since the start.",
            LABELS,
            multiprocess_mode="mostrecent",
        )
        self._ttft = Histogram(
            f"{PREFIX}time_to_first_token_seconds",
            "From vLLM's queue to the first token, of finished requests, by class.",
            (*LABELS, "class"),
            buckets=BUCKETS,
        )

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if not self._on:
            return
        if scheduler_stats is not None:
            self._record_queues(scheduler_stats.num_kv_fetch_reqs_by_stage, str(engine_idx))
        if iteration_stats is not None:
            for finished in iteration_stats.finished_requests:
                new_tokens = finished.num_prompt_tokens - finished.num_cached_tokens
                short = new_tokens <= self._boundary.get(engine_idx, BOUNDARY)
                self._ttft.labels(str(engine_idx), "short" if short else "long").observe(
                    finished.queued_time + finished.prefill_time
                )

    def log_engine_initialized(self) -> None:
        pass

    def _record_queues(self, numbers: dict[str, int], engine: str) -> None:
        """Takes this project's numbers out of the field in which they travelled."""
        for kind in ("short", "long"):
            count = numbers.pop(PREFIX + kind, None)
            if count is not None:
                self._waiting.labels(engine, kind).set(count)
        boundary = numbers.pop(PREFIX + "boundary", None)
        if boundary is not None:
            self._boundary[int(engine)] = boundary
            self._limit.labels(engine).set(boundary)
        nested = numbers.pop(PREFIX + "nested", None)
        if nested is not None:
            self._nested.labels(engine).set(nested)
