"""OpenTelemetry spans of requests: queue, prefill, transfer, decode. Optional.

Spans are made when a request has ended, from the times in its journal entry: nothing is added to
the way of a token.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from typing import Any

from pla_serve.server.records.journal import JournalEntry

log = logging.getLogger(__name__)

VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""Either of them turns tracing on, as the flag does. The exporter reads them, and its others."""
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter")
TRACE_HEADERS = ("traceparent", "tracestate")


class TracingError(ValueError):
    """Tracing was asked for and cannot be had; the message names the cure."""


def configured(endpoint: str | None) -> bool:
    """Whether spans are wanted."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return endpoint is not None or any(os.environ.get(name) for name in VARIABLES)


def check(endpoint: str | None) -> None:
    """Before anything is loaded.

    Raises:
        TracingError: tracing is wanted and its packages are not installed.
    """
    if not configured(endpoint):
        return
    for package in PACKAGES:
        if not _installed(package):
            raise TracingError(
                f"tracing needs the package {package.replace('.', '-')}: pip install "
                "'pla-serve[tracing]', or leave out --otlp-endpoint and the OTEL_ variables"
            )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of what it lies in
        return False


def open_tracing(endpoint: str | None, service: str) -> SpanJournal:
    """Spans go in batches, from a thread, to an OTLP collector over HTTP.

    Args:
        endpoint: base URL of the collector, as ``http://127.0.0.1:4318``; None: by the
            environment.
        service: what the process is called, unless ``OTEL_SERVICE_NAME`` says otherwise.

    Raises:
        TracingError: as `check`.
    """
    check(endpoint)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    traces = None if endpoint is None else endpoint.rstrip("/") + "/v1/traces"
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=traces)))
    log.info("traces go to %s", endpoint or "the collector that the environment names")
    return SpanJournal(provider)


class SpanJournal:
    """A span for each request, with one for each of its stages below it.

    Args:
        provider: an OpenTelemetry ``TracerProvider`` of the SDK.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("pla_serve")
        # Spans carry times of day; what was measured is on the monotonic clock.
        self._offset = time.time() - time.monotonic()

    def write(self, entry: JournalEntry) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(entry.traceparent))
        span = self._tracer.start_span(
            "request",
            context=parent,
            kind=trace.SpanKind.SERVER,
            start_time=self._at(entry.arrival),
            attributes={
                "pla_serve.request_id": entry.request_id,
                "pla_serve.outcome": entry.outcome,
                "gen_ai.usage.input_tokens": entry.prompt_tokens,
                "gen_ai.usage.output_tokens": entry.completion_tokens,
                "pla_serve.cached_tokens": entry.cached_tokens,
            },
        )
        below = trace.set_span_in_context(span, parent)
        for name, start, end in stages(entry):
            child = self._tracer.start_span(name, context=below, start_time=self._at(start))
            child.end(self._at(end))
        if entry.outcome == "error":
            span.set_status(trace.StatusCode.ERROR)
        span.end(self._at(entry.ended))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _at(self, seconds: float) -> int:
        """Nanoseconds since 1970."""
        return int((seconds + self._offset) * 1e9)


def stages(entry: JournalEntry) -> list[tuple[str, float, float]]:
    """Name, start and end of each stage that the request reached, one after another."""
    began, first = entry.prefill_began, entry.first_token
    found = [("queue", entry.arrival, entry.ended if began is None else began)]
    if began is not None:
        found.append(("prefill", began, entry.ended if first is None else first))
    if first is not None and entry.moved is not None:
        if entry.moved[0] > first:
            found.append(("decode", first, entry.moved[0]))
        found.append(("transfer", *entry.moved))
        first = entry.moved[1]
    if first is not None:
        found.append(("decode", first, entry.ended))
    return found
