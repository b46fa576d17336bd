"""Request ids, log entries and spans: what is told of each request, and to whom."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pla_serve import logs
from pla_serve.server.records import tracing
from pla_serve.server.records.journal import JournalEntry
from pla_serve.server.records.tracing import SpanJournal, TracingError, stages
from tests.server.fake_core import CRASH_SEED, REJECT_SEED
from tests.server.server_harness import Live, until

ASK = {"prompt": "abc", "max_tokens": 3}


def post(live: Live, body: dict[str, object], **headers: str) -> httpx.Response:
    return httpx.post(f"{live.url}/v1/completions", json={**ASK, **body}, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_id_of_the_client_comes_back(live: Live, stream: bool) -> None:
    answer = post(live, {"stream": stream}, **{"X-Request-Id": "mine-1"})
    assert answer.headers.get_list("x-request-id") == ["mine-1"]


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "new\tline"])
def test_other_ids_are_made_here_and_differ(live: Live, given: str) -> None:
    ids = {post(live, {}, **{"X-Request-Id": given}).headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    assert all(id.startswith("req-") for id in ids)


def test_errors_have_an_id_too(live: Live) -> None:
    answer = post(live, {"prompt": ""}, **{"X-Request-Id": "mine-2"})
    assert answer.status_code == 400
    assert answer.headers["x-request-id"] == "mine-2"


@contextmanager
def json_log() -> Iterator[Callable[[], list[dict[str, object]]]]:
    """What the whole process logs meanwhile."""
    root, stream = logging.getLogger(), StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter("server"))
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def entries(log: Callable[[], list[dict[str, object]]], id: str) -> list[dict[str, object]]:
    return [e for e in log() if e.get("request_id") == id and "outcome" in e]


@pytest.mark.parametrize(
    ("body", "outcome", "tokens"),
    [
        ({}, "length", 3),
        ({"stream": True}, "length", 3),
        ({"max_tokens": 9}, "stop", 4),
        ({"n": 2}, "length", 6),
        ({"seed": REJECT_SEED}, "refused", 0),
    ],
)
def test_every_request_has_one_entry(
    live: Live, body: dict[str, object], outcome: str, tokens: int
) -> None:
    id = f"entry-{len(body)}-{outcome}-{tokens}"
    with json_log() as log:
        post(live, body, **{"X-Request-Id": id})
        until(lambda: entries(log, id))
        (entry,) = entries(log, id)
    assert entry["outcome"] == outcome
    assert entry["completion_tokens"] == tokens
    assert entry["prompt_tokens"] == 3
    assert entry["process"] == "server"
    assert (entry["ttft_seconds"] is None) == (outcome == "refused")


def test_crash_is_an_error_in_the_journal(serve: Callable[..., Live]) -> None:
    live = serve()
    with json_log() as log:
        post(live, {"seed": CRASH_SEED, "stream": True}, **{"X-Request-Id": "crash"})
        until(lambda: entries(log, "crash"))
        (entry,) = entries(log, "crash")
    assert entry["outcome"] == "error"


def test_json_lines_carry_what_was_added() -> None:
    record = logging.makeLogRecord(
        {"name": "pla_serve.x", "levelno": 20, "levelname": "INFO", "msg": "a %s", "args": ("b",)}
    )
    record.depth = 3
    token = logs.request_id.set("r-1")
    try:
        line = json.loads(logs.JsonFormatter("short-0").format(record))
        text = logs.TextFormatter("short-0").format(record)
    finally:
        logs.request_id.reset(token)
    assert line | {"time": ""} == {
        "time": "",
        "level": "info",
        "process": "short-0",
        "logger": "x",
        "message": "a b",
        "request_id": "r-1",
        "depth": 3,
    }
    assert text.endswith("INFO short-0: a b (request r-1)")


def test_stages_follow_one_another() -> None:
    entry = JournalEntry("r", 10.0, prefill_began=11.0, first_token=12.0, ended=15.0)
    assert stages(entry) == [
        ("queue", 10.0, 11.0), ("prefill", 11.0, 12.0), ("decode", 12.0, 15.0),
    ]  # fmt: skip
    entry.moved = (12.0, 13.0)
    assert stages(entry)[2:] == [("transfer", 12.0, 13.0), ("decode", 13.0, 15.0)]
    entry.moved = (14.0, 14.5)
    assert stages(entry)[2:] == [
        ("decode", 12.0, 14.0), ("transfer", 14.0, 14.5), ("decode", 14.5, 15.0),
    ]  # fmt: skip
    assert stages(JournalEntry("r", 10.0, ended=11.0)) == [("queue", 10.0, 11.0)]
    assert stages(JournalEntry("r", 10.0, prefill_began=10.5, ended=11.0))[1:] == [
        ("prefill", 10.5, 11.0)
    ]


def test_spans_lie_in_the_trace_of_the_client() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace = "0af7651916cd43dd8448eb211c80319c"
    parent = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    entry = JournalEntry("r-7", 1.0, parent, prefill_began=2.0, first_token=3.0, ended=5.0)
    SpanJournal(provider).write(entry)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert list(spans) == ["queue", "prefill", "decode", "request"]
    request = spans["request"]
    assert {f"{span.context.trace_id:032x}" for span in spans.values()} == {trace}
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert request.attributes["pla_serve.request_id"] == "r-7"
    assert request.end_time - request.start_time == pytest.approx(4e9, abs=1e3)
    assert spans["prefill"].parent.span_id == request.context.span_id


def test_flag_sends_traces_to_a_collector(serve: Callable[..., Live]) -> None:
    bodies: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        live = serve(otlp_endpoint=f"http://127.0.0.1:{collector.server_port}")
        post(live, {}, **{"X-Request-Id": "traced"})
        live.stop()  # sends what is left
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    ((path, body),) = bodies
    assert path == "/v1/traces"
    for word in (b"queue", b"prefill", b"decode", b"traced"):
        assert word in body


def test_tracing_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "PACKAGES", ("opentelemetry.nowhere",))
    tracing.check(None)
    with pytest.raises(TracingError, match=r"pip install 'pla-serve\[tracing\]'"):
        tracing.check("http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(TracingError):
        tracing.check(None)
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracing.check("http://127.0.0.1:1")
