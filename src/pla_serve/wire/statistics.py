"""Load of an engine, for routers, and its counters, for metrics."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from pla_serve.policy.cost import CostProfile
from pla_serve.wire.limits import Count, Counts, Duration, Ratio, Ratios, Seconds, Share

MOST_FIRSTS = 1 << 16
"""First tokens of which one message tells."""


class EngineLoad(msgspec.Struct, frozen=True, kw_only=True):
    """State of one engine at one moment. Seconds are predictions of its own cost model.

    The engine sends it to its server within `EngineStats`, and the server passes it on to routers
    within `InstanceReport`.
    """

    short_waiting: Count = 0
    """Short requests that wait for their prefill."""
    long_waiting: Count = 0
    running: Count = 0
    """Requests that decode."""
    parked: Count = 0
    """Requests that wait for KV memory."""
    waiting_tokens: Count = 0
    """New tokens that wait for their prefill."""
    queued_short_seconds: Duration = 0.0
    """Predicted time to prefill the shorts that wait."""
    queued_long_seconds: Duration = 0.0
    kv_usage: Share = 0.0
    """Share of KV blocks held by requests; cached blocks that could be evicted do not count."""
    kv_cached_tokens: Count = 0
    boundary_tokens: Count = 0
    """L_m, the most new tokens that count as short; 0 if it is not known yet."""
    cost: CostProfile | None = None
    """Coefficients of the cost model; None if the server has none, or none yet."""

    @property
    def queued_seconds(self) -> float:
        """Predicted time to prefill all that waits."""
        return self.queued_short_seconds + self.queued_long_seconds

    @property
    def waiting(self) -> int:
        """Requests that wait for their prefill or for KV memory."""
        return self.short_waiting + self.long_waiting + self.parked


class LatencySample(msgspec.Struct, frozen=True, array_like=True):
    """Times of one first token, in seconds, by the class the request had on arrival."""

    short: bool
    queue: Seconds
    """From arrival to the begin of the prefill."""
    ttft: Seconds


class TransferStats(msgspec.Struct, frozen=True, kw_only=True):
    """KV transfer of one engine. Counters are totals since its start."""

    offers: Count
    """Open now: KV kept for other instances."""
    reserved: Count
    """Open now: requests that wait for KV from elsewhere, or for `Begin`."""
    taken_over: Count
    """Counter: requests begun with all KV that was offered for them."""
    recomputed: Count
    """Counter: requests begun without some of it."""
    expired: Count
    """Counter: offers and reservations that ended with their lease."""
    bytes_read: Count
    """Counter."""
    bytes_early: Count
    """Counter: of these, what was read before the other instance had computed the last layer."""
    read_seconds: Duration
    """Counter: time spent on reading, which runs beside the engine."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Sent a few times a second while work runs, and once on going idle. Counters are totals."""

    load: EngineLoad
    prefix_queries: Count
    """Counter: prompt tokens looked up in the prefix cache."""
    prefix_hits: Count
    """Counter: prompt tokens found there."""
    prompt_tokens: Count
    generation_tokens: Count
    batches: Counts
    """Counter by BatchClass."""
    express_batches: Count
    """Counter: batches that ran at a layer boundary of another one."""
    recompute_preemptions: Count
    offline_tokens: Count = 0
    """Counter: tokens of prompts and outputs that offline batches computed."""
    offline_seconds: Duration = 0.0
    """Counter: time of these batches."""
    idle_seconds: Duration = 0.0
    """Counter: time in which nothing ran."""
    cost_error: Ratio
    """Relative error of the cost model's recent predictions (median absolute)."""
    wait_error: Ratios
    """Relative error of recently predicted times to first tokens by class (median absolute)."""
    wait_coverage: Ratios
    """Share of recent first tokens by class that came by what was predicted for nine in ten."""
    firsts: Annotated[list[LatencySample], Meta(max_length=MOST_FIRSTS)]
    """First tokens since the last message."""
    transfer: TransferStats | None = None
    """None without KV transfer."""
    graph_replays: Counts = {}
    """Counter by captured shape, as ``tokens x requests``."""
    graph_fallbacks: Counts = {}
    """Counter by reason: batches on the ordinary kernels while shapes are captured."""
    steps_ahead: Count = 0
    """Counter: batches enqueued before the tokens of the one before them were known."""
    steps_waited: Counts = {}
    """Counter by reason: batches whose end was waited for before the next one was enqueued."""
    graph_tokens: Count = 0
    """Counter: real tokens in captured shapes."""
    graph_padding: Count = 0
    """Counter: padding there."""
    warming_up: bool = False
    """Whether the warm-up goes on while the engine is idle, after a start with a stored profile."""
    compile_failures: Count = 0
    """Counter: times that compiled layers were given up for eager ones."""
