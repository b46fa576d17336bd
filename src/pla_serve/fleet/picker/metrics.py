"""Metrics of the endpoint picker, beside those of the router."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class PickerMetrics:
    """Counts what the picker said; decisions themselves are among the router's metrics."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._requests = Counter(
            "pla_serve_picker:requests",
            "Requests that Envoy asked about: picked, without a prompt (sent somewhere), refused, "
            "or too large.",
            ["model_name", "outcome"],
            registry=registry,
        )
        self._open = Gauge(
            "pla_serve_picker:open_requests",
            "Requests that Envoy has not reported the end of.",
            ["model_name"],
            registry=registry,
        ).labels(model_name)
        self._model = model_name

    def ended(self, outcome: str) -> None:
        """Count a decision."""
        self._requests.labels(self._model, outcome).inc()

    def opened(self, by: int) -> None:
        """Count a request that Envoy began to ask about, or the end of one (-1)."""
        self._open.inc(by)
