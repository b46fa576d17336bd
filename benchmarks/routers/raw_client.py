"""A client that costs little: raw HTTP over kept connections, times by the loop's clock."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Times:
    """Of the requests of one phase, in seconds."""

    first: list[float] = field(default_factory=list)
    """From the request to the first bytes of its answer's body."""
    last: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: int = 0
    seconds: float = 0.0


class Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._done: asyncio.Future[None] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("closed"))

    async def ask(self, request: bytes, times: Times) -> None:
        self._done = asyncio.get_running_loop().create_future()
        self._head: bytes | None = b""
        self._tail = b""
        self._sent, self._first = time.perf_counter(), 0.0
        self._tokens = 0
        self._whole = False
        self._transport.write(request)
        await self._done
        now = time.perf_counter()
        times.first.append(self._first - self._sent)
        times.last.append(now - self._sent)
        times.tokens += self._tokens

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += data
            head, separator, body = self._head.partition(b"\r\n\r\n")
            if not separator:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._transport.close()
                return
            self._whole = b"content-length" in head.lower()
            self._length = (
                int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                if self._whole
                else 0
            )
            self._head, data = None, body
        if data and not self._first:
            self._first = time.perf_counter()
        if self._whole:
            self._length -= len(data)
            done = self._length <= 0
        else:
            self._tokens += data.count(b'"text"')
            self._tail = (self._tail + data)[-16:]
            done = self._tail.endswith(b"0\r\n\r\n")
        if done and self._done is not None and not self._done.done():
            self._done.set_result(None)


class Pool:
    """Kept connections to one server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[Connection] = []

    async def ask(self, request: bytes, times: Times) -> None:
        connection = self._free.pop() if self._free else await self._connect()
        try:
            await connection.ask(request, times)
        except ConnectionError:
            times.errors += 1
        else:
            self._free.append(connection)

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
        return connection

    def close(self) -> None:
        for connection in self._free:
            connection._transport.close()


def request_bytes(words: int, tokens: int, stream: bool, rng: random.Random) -> bytes:
    """One HTTP request with a prompt that no other one shares."""
    prompt = " ".join(str(rng.randrange(1, 500)) for _ in range(words))
    body = json.dumps(
        {
            "model": "fake",
            "prompt": prompt,
            "max_tokens": tokens,
            "stream": stream,
            "temperature": 0,
        }
    ).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )


async def open_loop(
    port: int, rate: float, seconds: float, words: int, tokens: int, seed: int
) -> Times:
    """Poisson arrivals, streamed answers; a request is late if the client is."""
    rng, times, pool = random.Random(seed), Times(), Pool(port)
    tasks = []
    began = due = time.perf_counter()
    while due - began < seconds:
        due += rng.expovariate(rate)
        request = request_bytes(words, tokens, True, rng)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(pool.ask(request, times)))
    await asyncio.gather(*tasks)
    times.seconds = time.perf_counter() - began
    pool.close()
    return times


async def closed_loop(
    port: int, clients: int, seconds: float, words: int, tokens: int, stream: bool, seed: int
) -> Times:
    """So many clients, each with one request after the other."""
    rng, times, pool = random.Random(seed), Times(), Pool(port)
    requests = [request_bytes(words, tokens, stream, rng) for _ in range(256)]
    began = time.perf_counter()

    async def client(number: int) -> None:
        turn = number
        while time.perf_counter() - began < seconds:
            await pool.ask(requests[turn % len(requests)], times)
            turn += clients

    await asyncio.gather(*(client(number) for number in range(clients)))
    times.seconds = time.perf_counter() - began
    pool.close()
    return times
