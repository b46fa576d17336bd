"""Engines of a tiny model in processes of their own, with NIXL between them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import UUID, uuid4

import msgspec
import torch
import zmq

from pla_serve.engine.config import EngineConfig
from pla_serve.engine.host.process import Launch
from pla_serve.engine.loop.parts import EngineParts
from pla_serve.engine.transfer.credentials import Credentials, fleet_secret
from pla_serve.engine.transfer.exchange import PeerExchange, assemble
from pla_serve.engine.transfer.layout import KVLayout
from pla_serve.engine.transfer.nixl import NixlTransport
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.registry import create_policy
from pla_serve.wire.engine import (
    AddRequest,
    EngineFailed,
    FromEngine,
    Inbound,
    Offer,
    Outbound,
    Output,
    Rejected,
    ToEngine,
    TransferStats,
)
from pla_serve.wire.kv_offer import FLEET_SECRET_VARIABLE
from tests.engine import tiny
from tests.engine.transfer.world import SECRET

ROOT = Path(__file__).parents[3]
LIFE_VARIABLE = "PLA_SERVE_TEST_LIFE"
PATIENCE = 120.0
"""Seconds; engines start slowly on a machine with much else to do."""


class TinyCore:
    """Engine that `pla_serve.engine.host.process` runs in a peer."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        inbox: Callable[[], Iterable[Inbound]],
        emit: Callable[[Outbound], None],
        clock: Callable[[], float],
    ) -> None:
        torch.set_num_threads(1)
        runner = tiny.runner("llama")

        def exchange(parts: EngineParts) -> PeerExchange:
            layout = KVLayout.of(runner._cache, tiny.BLOCK, "llama")
            made, _ = assemble(
                layout,
                parts.kv,
                parts.gate,
                parts.intake,
                credentials=Credentials(fleet_secret(), UUID(os.environ[LIFE_VARIABLE])),
                transport=NixlTransport,
            )
            return made

        cost = CostModel()
        policy = create_policy("fcfs", PolicyConfig(max_batch_tokens=16), cost)
        self._engine = tiny.make_engine(
            "llama", policy, cost=cost, exchange=exchange, clock=clock, max_model_len=500
        )
        self._inbox, self._emit = inbox, emit

    def step(self) -> float | None:
        self._engine.inbox.extend(self._inbox())
        self._engine.on_poll[:] = [lambda: self._engine.inbox.extend(self._inbox())]
        pause = self._engine.loop.step()
        for message in self._engine.emitted:
            self._emit(message)
        self._engine.emitted.clear()
        return pause


class Peer:
    """One such process, from its parent's side."""

    def __init__(self, folder: Path, name: str, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        inbound, outbound = (f"ipc://{folder}/{name}-{way}" for way in ("in", "out"))
        self._out = context.socket(zmq.PULL)
        self._out.bind(outbound)
        self._in = context.socket(zmq.PUSH)
        self._in.connect(inbound)
        life = uuid4()
        self.name = f"pla-{life}"
        """Name under which the engine reads."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pla_serve.engine.host.process", f"{__name__}:TinyCore"],
            stdin=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
                "OMP_NUM_THREADS": "1",
                FLEET_SECRET_VARIABLE: SECRET.decode(),
                LIFE_VARIABLE: str(life),
            },
        )
        assert self._process.stdin is not None
        launch = Launch(config=EngineConfig(), inbound=inbound, outbound=outbound)
        self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._process.stdin.flush()
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self.heard: list[FromEngine] = []

    def send(self, message: ToEngine) -> None:
        self._in.send(msgspec.msgpack.encode(message))

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait(PATIENCE)

    def hear(self, found: Callable[[FromEngine], bool]) -> FromEngine:
        """The first message, of those heard before or yet to come, that is wanted."""
        for message in self.heard:
            if found(message):
                return message
        deadline = time.monotonic() + PATIENCE
        while self._out.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            message = self._decode(self._out.recv())
            self.heard.append(message)
            assert not isinstance(message, EngineFailed), message
            if found(message):
                return message
        raise AssertionError(f"nothing of the kind was heard: {self.heard[-5:]}")

    def offer(self, request_id: str) -> Offer:
        message = self.hear(lambda m: isinstance(m, Offer) and m.id == request_id)
        assert isinstance(message, Offer)
        return message

    def end(self, request_id: str) -> Output | Rejected:
        """Return the last output of a request, or its refusal."""
        message = self.hear(
            lambda m: (
                (isinstance(m, Output) and m.id == request_id and bool(m.finish_reason))
                or (isinstance(m, Rejected) and m.id == request_id)
            )
        )
        assert isinstance(message, Output | Rejected)
        return message

    def tokens(self, request_id: str) -> tuple[int, ...]:
        """All of its output."""
        end = self.end(request_id)
        assert isinstance(end, Output), end
        return tuple(
            t for m in self.heard if isinstance(m, Output) and m.id == request_id for t in m.tokens
        )

    def stats(self, add: AddRequest) -> TransferStats:
        """After a request of its own, because an engine at rest reports nothing."""
        self.send(add)
        self.end(add.id)
        seen = len(self.heard)
        message = self.hear(
            lambda m: getattr(m, "transfer", None) is not None and self.heard.index(m) >= seen
        )
        return message.transfer  # type: ignore[union-attr,return-value]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.send_signal(signal.SIGCONT)
        self._process.wait(PATIENCE)
        self._in.close(linger=0)
        self._out.close(linger=0)
