"""Slow, silent and greedy sockets before a live server: bounded, while others are served."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress

import httpx
import psutil
import pytest

from pla_serve.server.limits import Limits
from tests.server.fake_core import SILENT_SEED
from tests.server.server_harness import DEADLINE, Live, until

Serve = Callable[..., Live]


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), DEADLINE)


def read_all(raw: socket.socket) -> bytes:
    """Everything until the server closes; b"" if it does so without a word."""
    answer = b""
    try:
        while part := raw.recv(65536):
            answer += part
    except ConnectionResetError:
        pass
    return answer


def status_of(answer: bytes) -> int:
    assert answer, "closed without an answer"
    return int(answer.split()[1])


def post(body: object, path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode() + content


def takes_all(raw: socket.socket, part: bytes, times: int) -> bool:
    """Whether the server lets so much be sent, rather than cut the connection or stop to read."""
    raw.settimeout(5.0)
    try:
        for _ in range(times):
            raw.sendall(part)
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def quick() -> Iterator[Live]:
    """A server that loses patience soon."""
    server = Live(limits=Limits(head_seconds=0.3, body_seconds=0.4, idle_seconds=0.4))
    server.wait_ready()
    yield server
    server.close()


def endless_header() -> Iterator[bytes]:
    yield b"GET /health HTTP/1.1\r\nX-Long: "
    while True:
        yield b"a" * 65536


def endless_headers() -> Iterator[bytes]:
    yield b"GET /health HTTP/1.1\r\n"
    while True:
        yield b"a: b\r\n" * 1000


def endless_path() -> Iterator[bytes]:
    yield b"GET /"
    while True:
        yield b"a" * 65536


@pytest.mark.parametrize("attack", [endless_header, endless_headers, endless_path])
def test_an_endless_head_is_refused_and_costs_no_memory(
    live: Live, attack: Callable[[], Iterator[bytes]]
) -> None:
    before = psutil.Process().memory_info().rss
    with closing(connect(live)) as raw:
        sent = 0
        try:
            for part in attack():
                raw.sendall(part)
                sent += len(part)
                assert sent < 64 * 2**20, "nobody stops it"
        except OSError:
            pass
        answer = read_all(raw)
    assert not answer or status_of(answer) == 431  # a reset may overtake the answer
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_a_head_that_is_a_little_too_large_is_told_so(live: Live) -> None:
    with closing(connect(live)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nX-Long: " + b"a" * 65600 + b"\r\n\r\n")
        answer = read_all(raw)
    assert status_of(answer) == 431
    assert b"larger than 65536 bytes" in answer


def test_a_large_head_within_the_limit_is_served(live: Live) -> None:
    with closing(connect(live)) as raw:
        raw.sendall(
            b"GET /health HTTP/1.1\r\nConnection: close\r\nX-Long: " + b"a" * 60000 + b"\r\n\r\n"
        )
        assert status_of(read_all(raw)) == 200


def test_too_many_headers_are_refused(live: Live) -> None:
    head = b"".join(b"h%d: x\r\n" % number for number in range(300))
    with closing(connect(live)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\n" + head + b"\r\n")
        assert status_of(read_all(raw)) == 431


def test_a_slow_head_ends(quick: Live) -> None:
    with closing(connect(quick)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nX-Slow: ")
        assert status_of(read_all(raw)) == 408


def test_a_silent_connection_is_closed(quick: Live) -> None:
    with closing(connect(quick)) as raw:
        assert read_all(raw) == b""


def test_an_idle_connection_is_closed(quick: Live) -> None:
    with closing(connect(quick)) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status_of(read_all(raw)) == 200


def test_a_slow_body_ends(quick: Live) -> None:
    with closing(connect(quick)) as raw:
        raw.sendall(post({"prompt": "x"})[:-3])
        assert status_of(read_all(raw)) == 408


def test_a_body_that_nobody_wants_does_not_keep_its_connection(quick: Live) -> None:
    """The answer is there; what still comes is not listened to for long."""
    with closing(connect(quick)) as raw:
        raw.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nx")
        assert status_of(read_all(raw)) == 404


def test_a_request_that_takes_long_is_not_cut(quick: Live) -> None:
    """Deadlines are for clients; an answer may take as long as it takes."""
    with closing(connect(quick)) as raw:
        raw.sendall(post({"prompt": "x", "seed": SILENT_SEED}))
        until(lambda: quick.metric("vllm:num_requests_running") == 1, "running")
        with closing(connect(quick)) as other:  # its deadline passes while the first one waits
            assert read_all(other) == b""
        assert quick.metric("vllm:num_requests_running") == 1


def test_silent_sockets_do_not_keep_others_out(serve: Serve) -> None:
    live = serve(limits=Limits(max_connections=32))
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(connect(live))) for _ in range(200)]
        answer = httpx.post(f"{live.url}/v1/completions", json={"prompt": "still here"})
        assert answer.json()["choices"][0]["text"] == "still here"
        assert len(live.instance.connections) <= 32
        assert read_all(sockets[0]) == b""


def test_more_requests_than_connections_get_503(serve: Serve) -> None:
    live = serve(limits=Limits(max_connections=4))
    with ExitStack() as stack:
        for _ in range(4):
            raw = stack.enter_context(closing(connect(live)))
            raw.sendall(post({"prompt": "x", "seed": SILENT_SEED}))
        until(lambda: live.instance.traffic.in_flight == 4, "arrival")
        refused = stack.enter_context(closing(connect(live)))
        answer = read_all(refused)
    assert status_of(answer) == 503
    assert b"retry-after" in answer
    until(lambda: len(live.instance.connections) == 0, "their end")


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    with closing(connect(live)) as raw:
        close = b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 5 + close)
        answer = read_all(raw)
    assert answer.count(b"HTTP/1.1 200") == 6
    assert answer.index(b"alive") < answer.index(b"version")


def test_a_flood_of_pipelined_requests_is_cut_off(live: Live) -> None:
    with closing(connect(live)) as raw:
        raw.sendall(post({"prompt": "x", "seed": SILENT_SEED}))
        until(lambda: live.instance.traffic.in_flight == 1, "arrival")
        assert not takes_all(raw, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 2000, 500)
    until(lambda: live.instance.traffic.in_flight == 0, "the end of its request")


def test_a_body_in_tiny_chunks_is_refused(live: Live) -> None:
    with closing(connect(live)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        raw.sendall(b"1\r\n \r\n" * 5000)
        answer = read_all(raw)
        assert status_of(answer) == 400
        assert b"too many small parts" in answer
        assert answer.count(b"HTTP/1.1") == 1
        until(lambda: live.instance.traffic.in_flight == 0, "the end of its request")
        assert not takes_all(raw, b"1\r\n \r\n" * 1000, 10**6), "it is read without an end"


def test_a_body_that_cannot_be_parsed_is_refused(live: Live) -> None:
    with closing(connect(live)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n"
        )
        answer = read_all(raw)
        assert status_of(answer) == 400
    until(lambda: live.instance.traffic.in_flight == 0, "the end of its request")


@pytest.mark.parametrize("beside", [b"0\r\nX-Trailer: ", b"2;"], ids=["trailer", "extension"])
@pytest.mark.parametrize("path", [b"/v1/completions", b"/nowhere"])
def test_what_comes_beside_a_body_is_bounded(live: Live, path: bytes, beside: bytes) -> None:
    """The parser copies an unfinished trailer for each piece of it: 20 MB took it minutes."""
    with closing(connect(live)) as raw:
        raw.sendall(
            b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n" + beside
        )
        sent = 0
        with suppress(OSError):
            while sent < 16 * 2**20:
                raw.sendall(b"a" * 16384)
                sent += 16384
        assert sent < 16 * 2**20, "nobody stops it"
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_small_trailers_are_accepted(live: Live) -> None:
    with closing(connect(live)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'21;why\r\n{"prompt": "chunks and trailers"}\r\n0\r\nX-Trailer: ' + b"a" * 4000
        )
        raw.sendall(b"\r\n\r\n")
        assert status_of(read_all(raw)) == 200


@pytest.mark.parametrize(
    ("pipelined", "close"), [(1, b""), (4, b""), (1, b"Connection: close\r\n")]
)
def test_answers_that_nobody_reads_are_thrown_away(
    serve: Serve, pipelined: int, close: bytes
) -> None:
    """Each would keep its megabytes, and its connection, for as long as the client likes."""
    live = serve(limits=Limits(head_seconds=0.3, idle_seconds=0.4), context=2**17)
    content = json.dumps({"prompt": "x" * 100_000, "echo": True, "n": 64}).encode()
    request = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + close
        + b"Content-Length: %d\r\n\r\n" % len(content)
        + content
    )
    with closing(socket.socket()) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", live.port))
        raw.sendall(request * pipelined)
        until(lambda: live.instance.traffic.in_flight == 1, "arrival")
        until(lambda: len(live.instance.connections) == 0, "the end of the connection")
    until(lambda: live.instance.traffic.in_flight == 0, "the end of its requests")


def test_a_body_in_a_few_small_chunks_is_served(live: Live) -> None:
    content = b'{"prompt": "chunks"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content)
    with closing(connect(live)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
        )
        answer = read_all(raw)
    assert status_of(answer) == 200
    assert b"chunks" in answer


HANDSHAKE = (
    b"GET /fleet/link HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


@pytest.mark.parametrize(
    "handshake",
    [
        HANDSHAKE.replace(b"13", b"99") + b"\r\n",
        HANDSHAKE + b"X-Long: " + b"a" * 20000 + b"\r\n\r\n",
        HANDSHAKE + b"h: x\r\n" * 200 + b"\r\n",
        HANDSHAKE.replace(b"/fleet/link", b"/nowhere") + b"\r\n",
    ],
    ids=["version", "long", "many", "path"],
)
def test_bad_handshakes_end_their_connection(live: Live, handshake: bytes) -> None:
    with closing(connect(live)) as raw:
        raw.sendall(handshake)
        answer = read_all(raw)
    assert not answer or 400 <= status_of(answer) < 500
    until(lambda: len(live.instance.connections) == 0, "the end of the connection")


def test_pings_without_reading_are_bounded(live: Live) -> None:
    with closing(connect(live)) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(HANDSHAKE + b"Sec-WebSocket-Protocol: " + subprotocol() + b"\r\n\r\n")
        ping = b"\x89\xfd\0\0\0\0" + b"p" * 125
        before = psutil.Process().memory_info().rss
        raw.settimeout(5.0)
        assert not takes_all(raw, ping * 1000, 500)
        assert psutil.Process().memory_info().rss - before < 48 * 2**20


def subprotocol() -> bytes:
    from pla_serve.wire.link import SUBPROTOCOL

    return SUBPROTOCOL.encode()
