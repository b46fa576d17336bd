"""Offline batches in /metrics."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge

LineOutcome = Literal["answered", "failed", "retried"]


class OfflineMetrics:
    """Families of one server.

    Args:
        model: value of the label ``model_name`` of every sample.
    """

    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._model = model
        self._waiting = Gauge(
            "pla_serve:offline_lines_waiting",
            "Lines of offline batches without an answer.",
            ["model_name"],
            registry=registry,
        )
        self._running = Gauge(
            "pla_serve:offline_lines_running",
            "Lines of offline batches that run.",
            ["model_name"],
            registry=registry,
        )
        self._lines = Counter(
            "pla_serve:offline_lines",
            "Lines of offline batches: answered, failed for good, or failed and to be run again.",
            ["model_name", "outcome"],
            registry=registry,
        )

    def waiting(self, lines: int) -> None:
        self._waiting.labels(self._model).set(lines)

    def running(self, lines: int) -> None:
        self._running.labels(self._model).set(lines)

    def line(self, outcome: LineOutcome) -> None:
        """Count a line that has ended."""
        self._lines.labels(self._model, outcome).inc()
