"""A hub with a fake engine, and routers that reach it without a network."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.websockets import WebSocket

from pla_serve.policy.protocol import Capabilities
from pla_serve.server.api.guard import Traffic
from pla_serve.server.api.link_access import LinkAccess
from pla_serve.server.engine.session import AnswerReceiver, EngineDiedError
from pla_serve.server.link.hub import LinkHub
from pla_serve.server.records.metrics import Metrics
from pla_serve.wire.engine import EngineReady
from pla_serve.wire.link import PATH, SUBPROTOCOL, FromInstance

READY = EngineReady(
    max_model_len=512,
    kv_tokens=4096,
    kv_bytes_per_token=64,
    layers=2,
    vocab_size=260,
    device="fake",
    dtype="float32",
    policy="length-aware",
    capabilities=Capabilities(leaves_at_layer_boundary=True),
)
read = msgspec.msgpack.Decoder(list[FromInstance]).decode


@dataclass
class FakeEngine:
    """The part of `EngineClient` that a hub uses. Records what it is sent."""

    boot: str = "1"
    up: bool = True
    observers: list[Any] = field(default_factory=list)
    routes: dict[str, AnswerReceiver] = field(default_factory=dict)
    sent: list[Any] = field(default_factory=list)

    def watch(self, observer: Any) -> None:
        self.observers.append(observer)

    def ping(self) -> None:
        for observer in self.observers:
            observer.alive()

    def open_route(self, id: str, session: AnswerReceiver) -> None:
        if not self.up:
            raise EngineDiedError("the engine is not running")
        self.routes[id] = session

    def close_route(self, id: str) -> None:
        self.routes.pop(id, None)

    def send(self, message: Any) -> None:
        self.sent.append(message)


def make_hub(engine: FakeEngine, access: LinkAccess | None = None) -> LinkHub:
    hub = LinkHub(
        engine,  # type: ignore[arg-type]
        access or LinkAccess(None),
        Traffic(Metrics("m")),
        model="m",
        block_tokens=16,
        role="mixed",
        clock=lambda: 1000.0,
    )
    hub.ready(READY)
    return hub


class Router:
    """One connection to a hub, as its server sees it."""

    def __init__(
        self,
        hub: LinkHub,
        *headers: tuple[bytes, bytes],
        client: tuple[str, int] | None = ("127.0.0.1", 9),
    ) -> None:
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[Any] = []
        scope = {
            "type": "websocket",
            "path": PATH,
            "headers": list(headers),
            "subprotocols": [SUBPROTOCOL],
            "client": client,
            "extensions": {"websocket.http.response": {}},
        }
        self.inbox.put_nowait({"type": "websocket.connect"})
        socket = WebSocket(scope, self.inbox.get, self._sent)  # type: ignore[arg-type]
        self.task = asyncio.ensure_future(hub.serve(socket))

    def frame(self, content: bytes) -> None:
        self.inbox.put_nowait({"type": "websocket.receive", "bytes": content})

    async def quiet(self) -> None:
        """Wait until the hub has read everything, or has ended."""
        while not self.inbox.empty() and not self.task.done():
            await asyncio.sleep(0)
        for _ in range(4):
            await asyncio.sleep(0)

    async def leave(self) -> None:
        self.inbox.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await self.task

    @property
    def messages(self) -> list[Any]:
        """What the hub has said."""
        frames = [each["bytes"] for each in self.sent if each["type"] == "websocket.send"]
        return [message for frame in frames for message in read(frame)]

    @property
    def closed(self) -> tuple[int, str] | None:
        """Status and reason with which the hub closed the link."""
        for each in self.sent:
            if each["type"] == "websocket.close":
                return each["code"], each["reason"]
        return None

    @property
    def status(self) -> int:
        """HTTP status: 101, or that of a refusal."""
        for each in self.sent:
            if each["type"] == "websocket.http.response.start":
                return int(each["status"])
            if each["type"] == "websocket.accept":
                return 101
        raise AssertionError("no answer")

    async def _sent(self, message: Any) -> None:
        self.sent.append(message)
