"""Commands of rank 0 to the other ranks: which batches to run, and when to enter each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self

import msgspec
import zmq

from pla_serve.engine.batch.flat import SpanRequest, SpanScores
from pla_serve.engine.kv.blocks import BlockRun


class SpanCommand(msgspec.Struct, frozen=True, array_like=True):
    """A `SpanRequest` for another rank, with its KV blocks as runs only."""

    tokens: list[int]
    history: int
    runs: list[BlockRun]
    wants_logits: bool
    scores: SpanScores | None = None
    pooled: tuple[int, int] | None = None

    @classmethod
    def of(cls, request: SpanRequest) -> Self:
        """Return what other ranks need of a request, which carries no token."""
        assert request.carried is None
        return cls(
            list(request.tokens),
            request.history,
            list(request.runs),
            request.wants_logits,
            request.scores,
            request.pooled,
        )

    def request(self) -> SpanRequest:
        """Return the request for the executor of this rank."""
        return SpanRequest(
            self.tokens,
            self.history,
            self.runs,
            self.wants_logits,
            scores=self.scores,
            pooled=self.pooled,
        )


class BeginPass(msgspec.Struct, frozen=True, tag=0, array_like=True):
    """Run this batch, inside ``depth`` other batches that are at a layer boundary."""

    depth: int
    requests: list[SpanCommand]

    @classmethod
    def of(cls, depth: int, requests: Sequence[SpanRequest]) -> Self:
        """Return the command to run these requests."""
        return cls(depth, [SpanCommand.of(request) for request in requests])


class Go(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """Enter this layer of the batch at this depth."""

    depth: int
    layer: int


class Abandon(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Leave the batch at this depth, which is at a layer boundary, for good."""

    depth: int


class UseIdleTime(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """See `Executor.use_idle_time`."""


class End(msgspec.Struct, frozen=True, tag=4, array_like=True):
    """End the rank; no command follows."""


class EndWarmUp(msgspec.Struct, frozen=True, tag=5, array_like=True):
    """See `Executor.end_warm_up`."""


Command = BeginPass | Go | Abandon | UseIdleTime | EndWarmUp | End


class SendCommand(Protocol):
    def __call__(self, command: Command) -> None:
        """Send a command to all other ranks, which get commands in this order; never blocks."""
        ...


class ReceiveCommand(Protocol):
    def __call__(self) -> Command:
        """Wait for the next command and return it."""
        ...


class CommandSender:
    """Sends commands on rank 0, over one socket for each other rank."""

    def __init__(self, folder: Path, size: int) -> None:
        self._context = zmq.Context()
        self._encode = msgspec.msgpack.Encoder().encode
        self._sockets = [self._context.socket(zmq.PUSH) for _ in range(1, size)]
        for rank, socket in enumerate(self._sockets, 1):
            socket.set_hwm(0)
            socket.connect(_address(folder, rank))

    def __call__(self, command: Command) -> None:
        """See `SendCommand`."""
        frame = self._encode(command)
        for socket in self._sockets:
            socket.send(frame, zmq.NOBLOCK)

    def close(self, linger_seconds: float) -> None:
        """Close the sockets; commands that were sent may take this long to leave."""
        self._context.destroy(linger=int(linger_seconds * 1000))


class CommandReceiver:
    """Receives commands on another rank; made before rank 0 learns that this rank has started."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._context = zmq.Context()
        self._decode = msgspec.msgpack.Decoder(Command).decode
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.bind(_address(folder, rank))

    def __call__(self) -> Command:
        """See `ReceiveCommand`."""
        command: Command = self._decode(self._socket.recv())
        return command

    def close(self) -> None:
        self._context.destroy(linger=0)


def _address(folder: Path, rank: int) -> str:
    return f"ipc://{folder / f'rank{rank}'}"
