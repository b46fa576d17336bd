"""Clients that misbehave on their sockets: slow, silent, endless, broken or not reading."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
MOST_SECONDS = 3.0
"""How long one of them goes on."""


@dataclass(frozen=True)
class Address:
    """A server, and a key that it admits; "" is no key."""

    host: str
    port: int
    key: str = ""

    def head(self, path: str, *lines: str, method: str = "POST") -> bytes:
        """Request line and headers, with the empty line."""
        words = [f"{method} {path} HTTP/1.1", f"Host: {self.host}"]
        if self.key:
            words.append(f"Authorization: Bearer {self.key}")
        return "\r\n".join([*words, *lines, "", ""]).encode()

    async def connect(self) -> Streams:
        return await asyncio.open_connection(self.host, self.port)


async def post(address: Address, path: str, body: bytes, seconds: float = 60.0) -> str:
    """Status of the answer, or the reason why there is none; reads at most a megabyte of it."""
    head = address.head(path, "Content-Type: application/json", f"Content-Length: {len(body)}")
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await address.connect()
            try:
                with suppress(ConnectionError):  # it may answer before it has read all
                    writer.write(head + body)
                    await writer.drain()
                return await status(reader)
            finally:
                writer.close()
    except TimeoutError:
        return "timeout"
    except OSError:
        return "closed"


async def status(reader: asyncio.StreamReader) -> str:
    """Status code of the answer, ``closed`` without one."""
    line = await reader.readline()
    read = 0
    while read < 2**20 and (part := await reader.read(65536)):
        read += len(part)
        if part.endswith((b"0\r\n\r\n", b"}")):
            break
    return line.split()[1].decode() if line.startswith(b"HTTP/") else "closed"


async def flood(writer: asyncio.StreamWriter, part: bytes) -> None:
    """Send a part again and again, as fast as it is taken."""
    while True:
        writer.write(part)
        await writer.drain()


async def endless_head(rng: Random, address: Address, streams: Streams) -> None:
    part = rng.choice((b"a" * 65536, b"x: y\r\n" * 5000, b"\r\n" * 5000, rng.randbytes(65536)))
    streams[1].write(rng.choice((b"GET /v1/models HTTP/1.1\r\nX: ", b"GET /", b"")))
    await flood(streams[1], part)


async def slow_head(rng: Random, address: Address, streams: Streams) -> None:
    for byte in address.head("/v1/models", "X-Slow: " + "a" * 4000, method="GET"):
        streams[1].write(bytes([byte]))
        await asyncio.sleep(rng.random() * 0.1)


async def silent(rng: Random, address: Address, streams: Streams) -> None:
    await asyncio.sleep(MOST_SECONDS)


async def crowd(rng: Random, address: Address, streams: Streams) -> None:
    """Very many silent connections at once."""
    count = rng.choice((100, 500, 1500))
    held = await asyncio.gather(*(address.connect() for _ in range(count)), return_exceptions=True)
    try:
        await asyncio.sleep(MOST_SECONDS / 2)
    finally:
        for each in held:
            if isinstance(each, tuple):
                each[1].transport.abort()


async def slow_body(rng: Random, address: Address, streams: Streams) -> None:
    streams[1].write(
        address.head("/v1/completions", "Content-Type: application/json", "Content-Length: 8000000")
    )
    while True:
        streams[1].write(b" " * rng.choice((1, 100, 60_000)))
        await streams[1].drain()
        await asyncio.sleep(rng.random() * 0.3)


async def tiny_chunks(rng: Random, address: Address, streams: Streams) -> None:
    streams[1].write(
        address.head(
            "/v1/completions", "Content-Type: application/json", "Transfer-Encoding: chunked"
        )
    )
    await flood(streams[1], rng.choice((b"1\r\n \r\n", b"1;x=y\r\n \r\n", b"01\r\n \r\n")) * 2000)


async def pipelined(rng: Random, address: Address, streams: Streams) -> None:
    path = rng.choice(("/health", "/v1/models", "/metrics", "/nowhere", "/openapi.json"))
    await flood(streams[1], address.head(path, method="GET") * rng.choice((1, 10, 1000)))


async def expects(rng: Random, address: Address, streams: Streams) -> None:
    streams[1].write(
        address.head(
            "/v1/completions",
            "Content-Type: application/json",
            "Expect: 100-continue",
            f"Content-Length: {rng.choice((1, 10**7, 10**18, 10**30))}",
        )
    )
    await asyncio.sleep(MOST_SECONDS * rng.random())


async def unread(rng: Random, address: Address, streams: Streams) -> None:
    """Ask for a long stream and do not read it."""
    body = json.dumps(
        {
            "prompt": "a",
            "max_tokens": 400,
            "ignore_eos": True,
            "stream": True,
            "n": rng.choice((1, 4)),
        }
    )
    streams[0]._limit = 1  # type: ignore[attr-defined]  # asyncio reads no further than this
    streams[1].write(
        address.head(
            "/v1/completions", "Content-Type: application/json", f"Content-Length: {len(body)}"
        )
        + body.encode()
    )
    await asyncio.sleep(MOST_SECONDS * rng.random())


async def left(rng: Random, address: Address, streams: Streams) -> None:
    """Leave in the middle of a request or an answer, politely or not."""
    body = json.dumps({"prompt": "a", "max_tokens": 200, "ignore_eos": True})
    request = (
        address.head(
            "/v1/completions", "Content-Type: application/json", f"Content-Length: {len(body)}"
        )
        + body.encode()
    )
    streams[1].write(request[: rng.randrange(1, len(request) + 1)])
    await asyncio.sleep(rng.random() * 0.3)
    if rng.random() < 0.5:
        streams[1].transport.abort()


async def rubbish(rng: Random, address: Address, streams: Streams) -> None:
    """A good head with bytes changed, or none at all."""
    head = bytearray(address.head(rng.choice(("/v1/models", "/fleet/link", "/metrics", "*"))))
    for _ in range(rng.randrange(1, 30)):
        head[rng.randrange(len(head))] = rng.randrange(256)
    streams[1].write(rng.choice((bytes(head), rng.randbytes(3000))))
    await streams[0].read(65536)


HANDSHAKE = (
    *("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


async def bad_upgrade(rng: Random, address: Address, streams: Streams) -> None:
    lines = [line for line in HANDSHAKE if rng.random() < 0.8]
    lines += [f"H{n}: {'a' * rng.choice((1, 9000))}" for n in range(rng.choice((0, 3, 200)))]
    path = rng.choice(("/fleet/link", "/v1/models", "/nowhere"))
    streams[1].write(address.head(path, *lines, method="GET"))
    await flood(streams[1], rng.randbytes(4000))


Attack = Callable[[Random, Address, Streams], Awaitable[None]]
SOCKET_ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        *(endless_head, slow_head, silent, crowd, slow_body, tiny_chunks, pipelined, expects),
        *(unread, left, rubbish, bad_upgrade),
    )
}


async def misbehave(name: str, rng: Random, address: Address) -> str:
    """Run one attack for a while; says how it ended."""
    try:
        streams = await address.connect()
    except OSError:
        return "no connection"
    try:
        async with asyncio.timeout(MOST_SECONDS):
            await SOCKET_ATTACKS[name](rng, address, streams)
        return "ended"
    except TimeoutError:
        return "went on"
    except OSError:
        return "cut off"
    finally:
        streams[1].transport.abort()
