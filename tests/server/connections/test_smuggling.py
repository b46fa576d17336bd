"""Requests that two parsers could read differently. Routers listen with the same code.

What stands behind a proxy must not see a second request where the proxy saw one. Each of these
either is refused, or is read as exactly one request; what could be a second one is never answered.
"""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.server.connections.test_connections import connect, read_all, status_of
from tests.server.server_harness import Live

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "a", "max_tokens": 1}'
HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)

REFUSED = {
    "length and chunks": HEAD + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "chunks and length": HEAD + CHUNKED + b"Content-Length: 4\r\n\r\n" + CHUNKS,
    "two lengths": HEAD + LENGTH + b"Content-Length: 0\r\n\r\n" + BODY,
    "two equal lengths": HEAD + LENGTH + LENGTH + b"\r\n" + BODY,
    "a list of lengths": HEAD + b"Content-Length: 32, 32\r\n\r\n" + BODY,
    "a signed length": HEAD + b"Content-Length: +32\r\n\r\n" + BODY,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
    "a hexadecimal length": HEAD + b"Content-Length: 0x20\r\n\r\n" + BODY,
    "an endless length": HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n" + BODY,
    "space before the colon": HEAD + b"Content-Length : 32\r\n\r\n" + BODY,
    "a folded header": HEAD + b"X: a\r\n Transfer-Encoding: chunked\r\n" + LENGTH + b"\r\n" + BODY,
    "bare line feeds in the head": HEAD.replace(b"\r\n", b"\n") + b"\n" + BODY,
    "a bare carriage return": HEAD
    + b"X: a\rTransfer-Encoding: chunked\r\n"
    + LENGTH
    + b"\r\n"
    + BODY,
    "a null in a header": HEAD + b"X: a\0b\r\n" + LENGTH + b"\r\n" + BODY,
    "another coding": HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKS,
    "a coding with a tab": HEAD + b"Transfer-Encoding:\tchunked\x0b\r\n\r\n" + CHUNKS,
    "a chunk's size with a sign": HEAD + CHUNKED + b"\r\n+2\r\n{}\r\n0\r\n\r\n",
    "a chunk's size with a prefix": HEAD + CHUNKED + b"\r\n0x2\r\n{}\r\n0\r\n\r\n",
    "a chunk's size beyond all": HEAD + CHUNKED + b"\r\n" + b"f" * 20 + b"\r\n{}\r\n0\r\n\r\n",
    "a chunk with a bare line feed": HEAD + CHUNKED + b"\r\n2\n{}\n0\n\n",
    "a length in the trailers": HEAD + CHUNKED + b"\r\n2\r\n{}\r\n0\r\nContent-Length: 9\r\n\r\n",
    "a chunk longer than its size": HEAD + CHUNKED + b"\r\n2\r\n{}{}\r\n0\r\n\r\n",
}


def talk(live: Live, content: bytes) -> bytes:
    with closing(connect(live)) as raw:
        raw.sendall(content)
        return read_all(raw)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_be_read_in_two_ways_is_refused(live: Live, kind: str) -> None:
    answer = talk(live, REFUSED[kind] + HIDDEN)
    assert not answer or status_of(answer) in (400, 431, 501)
    assert answer.count(b"HTTP/1.1 ") <= 1, "more than one request was read"
    assert b"/hidden" not in answer


READ_ONCE = {
    "a chunk's extension": b'%x;a=b;c="d"\r\n%b\r\n0\r\n\r\n' % (len(BODY), BODY),
    "trailers": b"%x\r\n%b\r\n0\r\nX: y\r\n\r\n" % (len(BODY), BODY),
    "leading zeros": b"000%x\r\n%b\r\n00\r\n\r\n" % (len(BODY), BODY),
}


@pytest.mark.parametrize("kind", READ_ONCE)
def test_odd_but_plain_chunks_are_one_request(live: Live, kind: str) -> None:
    with closing(connect(live)) as raw:
        raw.sendall(HEAD + CHUNKED + b"\r\n" + READ_ONCE[kind] + HIDDEN)
        answer = read_all(raw)
    assert status_of(answer) == 200
    assert answer.count(b"HTTP/1.1 ") == 2
    assert answer.count(b"HTTP/1.1 404") == 1
