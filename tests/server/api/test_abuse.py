"""Raw sockets that misbehave: they are answered properly or dropped, and others are served."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.server.fake_core import SILENT_SEED
from tests.server.server_harness import DEADLINE, Live, until

ENDLESS = {"prompt": "x" * 50, "ignore_eos": True, "max_tokens": 900_000}
SILENT = {"prompt": "x", "seed": SILENT_SEED}


@contextmanager
def endless_server(max_unread_tokens: int) -> Iterator[Live]:
    """Room for answers of half a minute and more, at a moderate pace."""
    server = Live(
        context=1_000_000,
        max_unread_tokens=max_unread_tokens,
        env={"FAKE_PAUSE": "0.001", "FAKE_TOKENS_PER_STEP": "32"},
    )
    server.wait_ready()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def roomy() -> Iterator[Live]:
    """Ends no answer because its client does not read."""
    with endless_server(max_unread_tokens=1_000_000) as server:
        yield server


@pytest.fixture(scope="module")
def strict() -> Iterator[Live]:
    """Ends answers of which a client leaves 64 tokens unread."""
    with endless_server(max_unread_tokens=64) as server:
        yield server


@contextmanager
def connection(live: Live, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    with socket.socket() as raw:
        if receive_buffer:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        raw.settimeout(DEADLINE)
        raw.connect(("127.0.0.1", live.port))
        yield raw


def request(body: object, path: str = "/v1/completions", length: int | None = None) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content) if length is None else length}\r\n\r\n"
    ).encode() + content


def read_status(raw: socket.socket) -> int:
    head = b""
    while b"\r\n" not in head:
        part = raw.recv(4096)
        assert part, "closed without an answer"
        head += part
    return int(head.split()[1])


def running(live: Live) -> float:
    return live.metric("vllm:num_requests_running")


def is_idle(live: Live) -> bool:
    return running(live) == 0 and live.instance.traffic.in_flight == 0


@pytest.mark.parametrize(
    "rubbish", [b"\x00\x01\x02\x03\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_not_http_is_refused(live: Live, rubbish: bytes) -> None:
    with connection(live) as raw:
        raw.sendall(rubbish)
        assert read_status(raw) == 400
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_ten_megabytes_are_refused_unread(live: Live) -> None:
    with connection(live) as raw:
        raw.sendall(request(b"", length=10 * 2**20))  # the body itself never comes
        assert read_status(raw) == 413


def test_ten_megabytes_without_a_length_are_refused(live: Live) -> None:
    def chunks() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(10):
            yield b"x" * 2**20
        yield b'"}'

    headers = {"content-type": "application/json"}
    with httpx.Client(timeout=DEADLINE) as client:
        url = f"{live.url}/v1/completions"
        try:
            response = client.post(url, content=chunks(), headers=headers)
        except httpx.WriteError:
            return  # the server closed while we were writing, as it may
    assert response.status_code == 413


def test_long_text_below_the_limit_says_how_long(live: Live) -> None:
    response = httpx.post(f"{live.url}/v1/completions", json={"prompt": "x" * 7_000_000})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "at least" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [ENDLESS, SILENT], ids=["endless", "silent"])
def test_disconnect_frees_the_engine(roomy: Live, body: dict[str, object], stream: bool) -> None:
    before = roomy.metric("vllm:request_success_total", finished_reason="abort")
    with connection(roomy) as raw:
        raw.sendall(request({**body, "stream": stream}))
        until(lambda: running(roomy) == 1, "running")
    until(lambda: is_idle(roomy), "idleness")
    assert roomy.metric("vllm:request_success_total", finished_reason="abort") == before + 1


def test_half_closed_connection_counts_as_gone(live: Live) -> None:
    with connection(live) as raw:
        raw.sendall(request(SILENT))
        until(lambda: running(live) == 1, "running")
        raw.shutdown(socket.SHUT_WR)
        until(lambda: is_idle(live), "idleness")


def test_disconnect_in_the_middle_of_a_body(live: Live) -> None:
    with connection(live) as raw:
        raw.sendall(request(b'{"prompt": "x', length=1000))
        until(lambda: live.instance.traffic.in_flight == 1, "arrival")
    until(lambda: is_idle(live), "idleness")


def test_reset_connection_frees_the_engine(live: Live) -> None:
    with connection(live) as raw:
        raw.sendall(request({**SILENT, "stream": True}))
        until(lambda: running(live) == 1, "running")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: is_idle(live), "idleness")


def test_client_that_does_not_read_is_ended_and_delays_nobody(strict: Live) -> None:
    admitted = strict.metric("vllm:prompt_tokens_total")
    with connection(strict, receive_buffer=4096) as raw:
        raw.sendall(request({**ENDLESS, "stream": True, "logprobs": 20}))
        # Its generation may be over before a poll sees it run; the counter stays.
        until(lambda: strict.metric("vllm:prompt_tokens_total") > admitted, "admission")
        answer = httpx.post(f"{strict.url}/v1/completions", json={"prompt": "other"})
        assert answer.json()["choices"][0]["text"] == "other"
        until(lambda: running(strict) == 0, "the end of its generation")
        ending = b""
        while b"client_too_slow" not in ending:
            part = raw.recv(65536)
            assert part, "closed without saying why"
            ending = ending[-100:] + part
    until(lambda: is_idle(strict), "idleness")


def test_many_at_once_all_get_their_own_answer(live: Live) -> None:
    with httpx.Client(timeout=DEADLINE) as client:
        sockets = []
        for index in range(30):
            raw = socket.create_connection(("127.0.0.1", live.port), DEADLINE)
            raw.sendall(request({"prompt": f"number {index}"}))
            sockets.append(raw)
        for index, raw in enumerate(sockets):
            with raw, raw.makefile("rb") as answer:
                length = 0
                while line := answer.readline().strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                text = json.loads(answer.read(length))["choices"][0]["text"]
                assert text == f"number {index}"
        assert client.get(f"{live.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_that_would_be_held_are_bounded(roomy: Live, stream: bool) -> None:
    """128 choices of 4,000 tokens with 20 alternatives were 2 GB in the server."""
    asked = {"prompt": "x", "n": 128, "max_tokens": 4000, "logprobs": 20, "stream": stream}
    if not stream:
        response = httpx.post(f"{roomy.url}/v1/completions", json=asked)
        assert response.status_code == 400
        assert "stream those of the output" in response.json()["error"]["message"]
        return
    with httpx.stream("POST", f"{roomy.url}/v1/completions", json=asked) as response:
        assert response.status_code == 200
