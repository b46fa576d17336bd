"""Reports of the engine to the server: queues, memory, costs and counters."""

from __future__ import annotations

from pla_serve.engine.loop.parts import LoopContext
from pla_serve.wire.engine import EngineLoad, EngineStats

REPORT_SECONDS = 0.25
"""Time between two reports while batches run."""


class EngineReports:
    """Sends a report from time to time while there is work, and one when there is none left."""

    def __init__(self, context: LoopContext) -> None:
        self._context = context
        self._sent = 0.0
        self._idle_blocks: int | None = None
        """Free KV blocks in the report that the engine is idle. None while there is work."""
        self._idle_since: float | None = None

    def send_if_due(self) -> None:
        """Send a report if the last one is old."""
        if self._context.clock() - self._sent >= REPORT_SECONDS:
            self.send()

    def send_idle(self) -> None:
        """Send a report that the engine is idle, once, and again if KV blocks come free.

        Blocks that are kept for other engines come free after the last request has ended.
        """
        now = self._context.clock()
        if self._idle_since is None:
            self._idle_since = now
        available = self._context.parts.kv.available
        if self._idle_blocks != available:
            self.send()
            self._idle_blocks = available

    def end_idle(self) -> None:
        """Note that there is work."""
        self._idle_blocks = None
        if self._idle_since is not None:
            self._context.telemetry.idle_seconds += self._context.clock() - self._idle_since
            self._idle_since = None

    def send(self) -> None:
        """Send a report now."""
        self._sent = now = self._context.clock()
        parts, counted = self._context.parts, self._context.telemetry
        waits, graphs = parts.intake.calibration, parts.executor.counts()
        self._context.emit(
            EngineStats(
                load=self._load(now),
                prefix_queries=counted.prefix_queries,
                prefix_hits=counted.prefix_hits,
                prompt_tokens=counted.prompt_tokens,
                generation_tokens=counted.generation_tokens,
                batches=dict(counted.batches),
                express_batches=counted.express_batches,
                recompute_preemptions=counted.recompute_preemptions,
                offline_tokens=counted.offline_tokens,
                offline_seconds=counted.offline_seconds,
                idle_seconds=counted.idle_seconds,
                cost_error=parts.cost.error(),
                wait_error={"short": waits.error(True), "long": waits.error(False)},
                wait_coverage={"short": waits.coverage(True), "long": waits.coverage(False)},
                firsts=counted.take_firsts(),
                transfer=parts.exchange.stats(),
                steps_ahead=counted.steps_ahead,
                steps_waited=dict(counted.steps_waited),
                graph_replays=dict(graphs.replays) if graphs else {},
                graph_fallbacks=dict(graphs.fallbacks) if graphs else {},
                graph_tokens=graphs.real_tokens if graphs else 0,
                graph_padding=graphs.padding_tokens if graphs else 0,
                warming_up=parts.recalibration.active,
                compile_failures=graphs.compile_failures if graphs else 0,
            )
        )

    def _load(self, now: float) -> EngineLoad:
        """Return queues, memory and costs, which routers go by."""
        parts = self._context.parts
        queue, kv, cost = parts.policy.state(now), parts.kv, parts.cost
        return EngineLoad(
            short_waiting=queue.short_requests,
            long_waiting=queue.long_requests,
            running=queue.decoding_requests,
            parked=len(parts.gate),
            waiting_tokens=queue.short_tokens + queue.long_tokens,
            queued_short_seconds=queue.short_seconds,
            queued_long_seconds=max(0.0, queue.seconds - queue.short_seconds),
            kv_usage=1 - kv.available / kv.blocks,
            kv_cached_tokens=kv.cached_tokens,
            boundary_tokens=cost.boundary(),
            cost=cost.profile,
        )
