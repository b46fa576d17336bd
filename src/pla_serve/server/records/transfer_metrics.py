"""KV transfer in /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from pla_serve.wire.engine import TransferStats


class TransferMetrics:
    """Families of one server; they stay empty without KV transfer.

    Args:
        label: of every sample.
    """

    def __init__(self, registry: CollectorRegistry, label: dict[str, str]) -> None:
        self._label = label
        self._open = Gauge(
            "pla_serve:kv_transfers_open",
            "KV kept for other instances (offered), and requests that wait for KV (reserved).",
            [*label, "side"],
            registry=registry,
        )
        self._ended = Counter(
            "pla_serve:kv_transfers",
            "Requests begun with all KV that was offered (taken_over) or without some "
            "(recomputed); offers and reservations that ended with their lease (expired).",
            [*label, "outcome"],
            registry=registry,
        )
        self._bytes = Counter(
            "pla_serve:kv_read_bytes",
            "KV read from other instances, before their last layer was computed (early) or after.",
            [*label, "when"],
            registry=registry,
        )
        self._seconds = Counter(
            "pla_serve:kv_read_seconds",
            "Time spent on reading KV, beside the engine.",
            list(label),
            registry=registry,
        )
        self._seen: TransferStats | None = None

    def restarted(self) -> None:
        """A new engine process counts from zero."""
        self._seen = None

    def stats(self, stats: TransferStats | None) -> None:
        """Take in a report; totals go up by what is new in it."""
        if stats is None:
            return
        seen, self._seen = self._seen, stats
        for side, value in (("offered", stats.offers), ("reserved", stats.reserved)):
            self._open.labels(**self._label, side=side).set(value)
        for outcome in ("taken_over", "recomputed", "expired"):
            new = getattr(stats, outcome) - (getattr(seen, outcome) if seen else 0)
            self._ended.labels(**self._label, outcome=outcome).inc(new)
        early = stats.bytes_early - (seen.bytes_early if seen else 0)
        read = stats.bytes_read - (seen.bytes_read if seen else 0)
        self._bytes.labels(**self._label, when="early").inc(early)
        self._bytes.labels(**self._label, when="late").inc(read - early)
        seconds = stats.read_seconds - (seen.read_seconds if seen else 0.0)
        self._seconds.labels(**self._label).inc(seconds)
