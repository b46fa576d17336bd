"""Hosts one engine in a process: ``python -m pla_serve.engine.host.process FACTORY``.

The process imports the factory, which takes seconds, and then reads one line of JSON, a `Launch`,
from its standard input. It ends when that input ends, because the pipe closes with the parent,
however the parent died. It ignores SIGINT and SIGTERM, which a terminal or a service manager sends
to the whole group while the parent still drains.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Protocol

import msgspec
import zmq

from pla_serve.cores import leave_bound_cores, on_the_same_cores
from pla_serve.engine.child import await_end_of_parent
from pla_serve.engine.config import EngineConfig
from pla_serve.logs import LogFormat, configure
from pla_serve.wire.codec import WireError, encode, engine_inbox, named_request
from pla_serve.wire.engine import (
    EngineFailed,
    FromEngine,
    Inbound,
    Outbound,
    Ping,
    Pong,
    Rejected,
    Shutdown,
)

log = logging.getLogger(__name__)

CORE = "pla_serve.engine.build.engine:EngineCore"
"""Factory of the real engine, as ``module:attribute``."""
MOST_AT_ONCE = 128
"""Most messages taken at once, so that a flood of them does not hold up the running batch."""
LONGEST_PAUSE = 3600.0
"""Longest wait in seconds. After a longer pause the engine is simply asked again."""
LINGER_SECONDS = 2.0
"""Seconds that a process which ends waits for its last messages to leave."""


class Core(Protocol):
    """Engine that the process drives. See `pla_serve.engine.build.engine.EngineCore`."""

    def step(self) -> float | None:
        """Run at most one batch.

        Returns the seconds that the engine may be left alone, or None until a message comes.
        """
        ...


class CoreFactory(Protocol):
    """Makes an engine. It emits `EngineReady` once the engine can take requests."""

    def __call__(
        self,
        config: EngineConfig,
        *,
        inbox: Callable[[], Iterable[Inbound]],
        emit: Callable[[Outbound], None],
        clock: Callable[[], float],
    ) -> Core: ...


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that the parent writes to the child's standard input, as one line of JSON."""

    config: EngineConfig
    inbound: str
    """ZeroMQ address where the child listens for `ToEngine`."""
    outbound: str
    """ZeroMQ address where the parent listens for `FromEngine`."""
    log_level: str = "INFO"
    log_format: LogFormat = "text"


class Channel:
    """Messages between the child and its parent, over one ZeroMQ socket for each direction.

    Sending never blocks: messages that the parent has not read yet are queued without a limit.
    """

    def __init__(self, launch: Launch) -> None:
        self._context = zmq.Context()
        self._in = self._context.socket(zmq.PULL)
        self._out = self._context.socket(zmq.PUSH)
        for socket in (self._in, self._out):
            socket.set_hwm(0)
        self._in.bind(launch.inbound)
        self._out.connect(launch.outbound)
        self._decode = engine_inbox()
        self.closing = False
        """Whether a `Shutdown` has arrived."""

    def inbox(self) -> Iterable[Inbound]:
        """Return the messages that have arrived, up to MOST_AT_ONCE. Never blocks."""
        arrived: list[Inbound] = []
        for _ in range(MOST_AT_ONCE):
            try:
                content = self._in.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = self._decode(content)
            except WireError as error:
                self._refuse(content, error)
                continue
            if isinstance(message, Shutdown):
                self.closing = True
            elif isinstance(message, Ping):
                self.emit(Pong())
            else:
                arrived.append(message)
        return arrived

    def _refuse(self, content: bytes, error: WireError) -> None:
        """Reject the request of a message with a field out of range. The engine goes on."""
        id = named_request(content)
        log.error("a message to the engine is not valid: %s", error)
        if id is not None:
            self.emit(Rejected(id=id, reason=f"invalid request: {error}", retry_after=None))

    def emit(self, message: FromEngine) -> None:
        """Send a message to the parent. Never blocks."""
        self._out.send(encode(message), zmq.NOBLOCK)

    def wait(self, seconds: float | None) -> None:
        """Block until a message arrives, for at most ``seconds``. None waits without a limit."""
        # Rounded up to the poller's milliseconds: rounded down, the last one would be a busy wait.
        self._in.poll(None if seconds is None else int(min(seconds, LONGEST_PAUSE) * 1000) + 1)

    def close(self) -> None:
        """Close both sockets, once the last messages have left or LINGER_SECONDS are over."""
        self._in.close(linger=0)
        self._out.close(linger=int(LINGER_SECONDS * 1000))
        self._context.term()


def load_factory(name: str) -> CoreFactory:
    """Import a factory by its name, ``module:attribute``."""
    module, _, attribute = name.partition(":")
    factory: CoreFactory = getattr(importlib.import_module(module), attribute)
    return factory


def serve(factory: str, launch: Launch, channel: Channel) -> int:
    """Run the engine until `Shutdown`, or until it crashes, which is reported to the parent.

    Returns the exit status of the process.
    """
    starting = True
    try:
        core = load_factory(factory)(
            launch.config, inbox=channel.inbox, emit=channel.emit, clock=time.monotonic
        )
        starting = False
        leave_bound_cores()
        while not channel.closing:
            pause = core.step()
            if not channel.closing and (pause is None or pause > 0):
                channel.wait(pause)
    except Exception as error:
        # Settings that do not work are for the user to change: the message alone says how.
        expected = starting and _is_expected(error)
        log.log(logging.DEBUG if expected else logging.ERROR, "engine core failed", exc_info=True)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        channel.emit(EngineFailed(error=text, starting=starting))
        return 1
    return 0


def _is_expected(error: Exception) -> bool:
    """Return whether the message of an error alone says what to do."""
    loading = sys.modules.get("pla_serve.engine.loading.errors")  # heavy, and maybe not needed
    kinds = (ValueError, OSError, *([loading.LoadingError] if loading else []))
    return isinstance(error, kinds)


def exit_with_parent() -> None:
    """Block until the parent is gone, then end this process in the middle of whatever it does."""
    await_end_of_parent()
    os._exit(1)


def main() -> int:
    """Read the `Launch` from standard input, and serve. Returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    factory = sys.argv[1]
    with on_the_same_cores(), suppress(Exception):  # it is raised again where it can be reported
        load_factory(factory)
    line = sys.stdin.buffer.readline()
    if not line:
        return 1  # the parent is gone, or has no use for an engine
    launch = msgspec.json.decode(line, type=Launch)
    configure(launch.log_level, launch.log_format, "engine")
    threading.Thread(target=exit_with_parent, name="parent-watch", daemon=True).start()
    channel = Channel(launch)
    status = serve(factory, launch, channel)
    channel.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
