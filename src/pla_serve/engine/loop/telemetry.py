"""Counters of one engine core, and when to send them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pla_serve.engine.kv.manager import KVManager
from pla_serve.engine.requests.sequence import Sequence
from pla_serve.engine.run.graphs.counts import GridCounts
from pla_serve.policy.calibration import Calibration
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, QueueState
from pla_serve.wire.engine import EngineLoad, EngineStats, LatencySample, TransferStats

REPORT_SECONDS = 0.25


@dataclass(slots=True)
class Telemetry:
    """What has been counted since the start, and first tokens since the last report."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    express_batches: int = 0
    recompute_preemptions: int = 0
    steps_ahead: int = 0
    steps_waited: Counter[str] = field(default_factory=Counter)
    batches: Counter[str] = field(default_factory=Counter)
    firsts: list[LatencySample] = field(default_factory=list)
    _reported: float = 0.0

    def count_batch(self, batch: Batch, nested: bool) -> None:
        """A batch was computed."""
        self.batches[batch.kind.value] += 1
        self.express_batches += nested
        self.prompt_tokens += sum(chunk.tokens for chunk in batch.prefills)

    def count_lookup(self, sequence: Sequence) -> None:
        """A prefill began."""
        self.prefix_queries += len(sequence.tokens)
        self.prefix_hits += sequence.computed

    def count_first(self, sequence: Sequence, now: float) -> None:
        """The first token of an answer was made; one that was begun elsewhere has it already."""
        if sequence.request.generated:
            return
        arrival = sequence.request.arrival
        queued = (sequence.started if sequence.started is not None else now) - arrival
        self.firsts.append(LatencySample(sequence.short, queued, now - arrival))

    def due(self, now: float) -> bool:
        """Whether it is time for a report while work runs."""
        return now - self._reported >= REPORT_SECONDS

    def report(
        self,
        now: float,
        *,
        queue: QueueState,
        kv: KVManager,
        parked: int,
        cost: CostModel,
        waits: Calibration,
        transfer: TransferStats | None,
        graphs: GridCounts | None = None,
    ) -> EngineStats:
        """The state as a message; starts a new list of first tokens."""
        self._reported = now
        firsts, self.firsts = self.firsts, []
        return EngineStats(
            load=EngineLoad(
                short_waiting=queue.short_requests,
                long_waiting=queue.long_requests,
                running=queue.decoding_requests,
                parked=parked,
                waiting_tokens=queue.short_tokens + queue.long_tokens,
                queued_short_seconds=queue.short_seconds,
                queued_long_seconds=max(0.0, queue.seconds - queue.short_seconds),
                kv_usage=1 - kv.available / kv.blocks,
                kv_cached_tokens=kv.cached_tokens,
                boundary_tokens=cost.boundary(),
                cost=cost.profile,
            ),
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            batches=dict(self.batches),
            express_batches=self.express_batches,
            recompute_preemptions=self.recompute_preemptions,
            cost_error=cost.error(),
            wait_error={"short": waits.error(True), "long": waits.error(False)},
            wait_coverage={"short": waits.coverage(True), "long": waits.coverage(False)},
            firsts=firsts,
            transfer=transfer,
            steps_ahead=self.steps_ahead,
            steps_waited=dict(self.steps_waited),
            graph_replays=dict(graphs.replays) if graphs else {},
            graph_fallbacks=dict(graphs.fallbacks) if graphs else {},
            graph_tokens=graphs.real_tokens if graphs else 0,
            graph_padding=graphs.padding_tokens if graphs else 0,
            compile_failures=graphs.compile_failures if graphs else 0,
        )
