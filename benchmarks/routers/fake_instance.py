"""An instance that costs next to nothing, so that what is measured is the router before it.

Speaks the OpenAI API (``/v1/completions``, streamed or whole, and what routers probe) on one port
and our link to routers on the next one. Prompts are not looked at; tokens come at a given pace.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from pla_serve.policy.cost import CostProfile
from pla_serve.wire.codec import instance_frames
from pla_serve.wire.engine import AbortRequest, Accepted, AddRequest, EngineLoad, Output
from pla_serve.wire.frames import Outbox
from pla_serve.wire.link import (
    SUBPROTOCOL,
    InstanceFacts,
    InstanceReport,
)

MODEL = "fake"
VOCABULARY = 512
COST = CostProfile(1e-6, 0, 0, 0, 1e-4)
CHUNK = (
    b'{"id":"cmpl-0","object":"text_completion","created":0,"model":"fake","choices":'
    b'[{"index":0,"text":" 7","logprobs":null,"finish_reason":null}]}'
)
LAST = CHUNK.replace(b'"finish_reason":null', b'"finish_reason":"length"')
INFO = {
    "model_path": MODEL,
    "served_model_name": MODEL,
    "tokenizer_path": MODEL,
    "is_generation": True,
    "max_model_len": 4096,
}


class Pace:
    """One task for all streams: every ``seconds`` each of them is due a token."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._due: dict[str, Callable[[], bool]] = {}

    def add(self, id: str, make: Callable[[], bool]) -> None:
        """The first token at once; ``make`` returns False with the last one."""
        if make():
            self._due[id] = make

    def drop(self, id: str) -> None:
        self._due.pop(id, None)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            for id, make in list(self._due.items()):
                if not make():
                    self._due.pop(id, None)


class Http(asyncio.Protocol):
    """One keep-alive connection: one request after the other, no pipelining."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._buffer = self._head = b""
        self._id = uuid.uuid4().hex

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._pace.drop(self._id)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        if headers.get("transfer-encoding") == "chunked":
            if not rest.endswith(b"0\r\n\r\n"):
                return
            body = _unchunked(rest)
        else:
            length = int(headers.get("content-length", 0))
            if len(rest) < length:
                return
            body = rest[:length]
        self._buffer = b""
        method, path, _ = lines[0].split(" ")
        if method == "POST":
            self._complete(json.loads(body))
        elif path.startswith("/v1/models"):
            self._json({"object": "list", "data": [{"id": MODEL, "object": "model", **INFO}]})
        else:
            self._json(INFO)

    def _complete(self, body: dict[str, Any]) -> None:
        left = int(body.get("max_tokens", 16))
        if not body.get("stream"):
            usage = {"prompt_tokens": 1, "completion_tokens": left, "total_tokens": left + 1}
            self._json({**json.loads(LAST), "usage": usage})
            return
        self._head = (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        self._left = left
        self._pace.add(self._id, self._make)

    def _make(self) -> bool:
        self._left -= 1
        data = b"data: " + (CHUNK if self._left else LAST) + b"\n\n"
        if not self._left:
            data += b"data: [DONE]\n\n"
        end = b"" if self._left else b"0\r\n\r\n"
        self._transport.write(b"%s%x\r\n%s\r\n%s" % (self._head, len(data), data, end))
        self._head = b""
        return bool(self._left)

    def _json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
            % (len(body), body)
        )


def _unchunked(data: bytes) -> bytes:
    body = b""
    while True:
        size, _, data = data.partition(b"\r\n")
        if not int(size, 16):
            return body
        body, data = body + data[: int(size, 16)], data[int(size, 16) + 2 :]


class Linked:
    """One router's link."""

    def __init__(self, pace: Pace, socket: ServerConnection) -> None:
        self._pace = pace
        self._socket = socket
        self._outbox = Outbox(1 << 28)
        self._mine = uuid.uuid4().hex

    async def run(self) -> None:
        self._outbox.put(
            InstanceFacts(
                boot=uuid.uuid4().hex,
                kind="pla",
                model=MODEL,
                max_model_len=4096,
                vocab_size=VOCABULARY,
                kv_tokens=200_000,
                block_tokens=16,
                express=True,
                resumes=True,
            )
        )
        beats, writes = asyncio.create_task(self._beat()), asyncio.create_task(self._write())
        decode = instance_frames()
        with suppress(ConnectionClosed):
            async for frame in self._socket:
                for message in decode(frame):  # type: ignore[arg-type]
                    if isinstance(message, AddRequest):
                        self._add(message)
                    elif isinstance(message, AbortRequest):
                        self._pace.drop(self._mine + message.id)
        beats.cancel()
        writes.cancel()

    def _add(self, request: AddRequest) -> None:
        self._outbox.put(Accepted(request.id, 0))
        left = [request.sampling.max_tokens - request.generated]

        def make() -> bool:
            left[0] -= 1
            self._outbox.put(
                Output(id=request.id, tokens=[7], finish_reason=None if left[0] else "length")
            )
            return bool(left[0])

        self._pace.add(self._mine + request.id, make)

    async def _beat(self) -> None:
        while True:
            report = InstanceReport(
                role="mixed",
                ready=True,
                draining=False,
                load=EngineLoad(cost=COST, boundary_tokens=256),
            )
            self._outbox.put(report)
            await asyncio.sleep(0.2)

    async def _write(self) -> None:
        with suppress(ConnectionClosed):
            while True:
                await self._socket.send(await self._outbox.take())


async def main(ports: list[int], token_seconds: float) -> None:
    pace = Pace(token_seconds)
    loop = asyncio.get_running_loop()
    for port in ports:
        await loop.create_server(lambda: Http(pace), "127.0.0.1", port)
        await serve(
            lambda socket: Linked(pace, socket).run(),
            "127.0.0.1",
            port + 1,
            subprotocols=[SUBPROTOCOL],  # type: ignore[list-item]
            compression=None,
            ping_interval=None,
        )
    print("ready", flush=True)
    await pace.run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, action="append", help="each takes two, this and +1")
    parser.add_argument("--token-seconds", type=float, default=0.02)
    options = parser.parse_args()
    uvloop.run(main(options.port, options.token_seconds))
