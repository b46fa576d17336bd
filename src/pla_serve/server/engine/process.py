"""One life of the engine: a child process, its two sockets and their private folder."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import zmq

from pla_serve.engine.child import PrivateFolder, tell
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.host.process import CORE, Launch
from pla_serve.engine.kernels.levels import limits_of_torch
from pla_serve.environment import usable_cores
from pla_serve.logs import LogFormat
from pla_serve.wire.codec import WireError, encode, engine_answers, named_request
from pla_serve.wire.engine import EngineFailed, FromEngine, Output, Shutdown, ToEngine

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 0.2
"""How long the reason for an exit may come after the exit itself."""

KEPT_BYTES = 2**30
"""Freed memory that the allocator keeps, so that the next forward pass finds it mapped."""

KEPT_DESCRIPTIONS, KEPT_PRIMITIVES = 128, 256
"""Matrix products that torch and oneDNN remember, about 0.3 MiB each."""

ENVIRONMENT = {
    "GOMP_SPINCOUNT": "10000",
    "LRU_CACHE_CAPACITY": str(KEPT_DESCRIPTIONS),
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KEPT_PRIMITIVES),
    "GLIBC_TUNABLES": (
        "glibc.malloc.hugetlb=1"
        f":glibc.malloc.trim_threshold={KEPT_BYTES}:glibc.malloc.mmap_threshold={KEPT_BYTES}"
    ),
}
"""What the engine process starts with; the user's environment goes first.

Threads of the engine that wait for each other spin some tens of microseconds, then sleep.

Without a bound, on a machine that other processes use too (this one and its clients, say), a
spinning thread keeps the very thread from running that it waits for, and steps take many times as
long. Without any spinning a step of many small operations pays for a wake-up in each.

A linear of oneDNN is set up anew for each number of tokens, and kept by two caches: torch's, which
``LRU_CACHE_CAPACITY`` bounds, and its own. With their default of 1,024 entries, prompts of many
lengths made them grow by hundreds of MiB. A pass needs 4 entries of the first and 8 of the second,
so 32 numbers of tokens stay. Any other is set up again in the first layer of its pass.

Large pages, where Linux grants them on request: a decode step reads every weight once, and with
small ones it waits for address translations. Activations of a pass are allocated and freed layer by
layer: memory that goes back to the system in between is cleared by it, page by page, each time.
Other C libraries ignore the variable."""


PLACES = {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}
"""Each compute thread of an engine that has as many of them as there are cores keeps to its own.

Where another process is busy, however low its priority, the system may put two compute threads on
one core otherwise. Then each waits for the other to give up its time slice in every operation, and
a decode step takes ten times as long. An engine with fewer threads than cores is not bound: two of
them would be bound to the same cores."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Description of an engine process, from which it is started as often as needed."""

    config: EngineConfig
    factory: str = CORE
    """``module:attribute``, imported in the child; tests put a double here."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the child's environment."""
    log_level: str = "INFO"
    log_format: LogFormat = "text"


def spawn(spec: EngineSpec) -> subprocess.Popen[bytes]:
    """Start an engine process. It imports what it needs, then waits to be told what to serve."""
    limits = limits_of_torch(spec.config.cpu_kernels)
    return subprocess.Popen(
        [sys.executable, "-m", "pla_serve.engine.host.process", spec.factory],
        stdin=subprocess.PIPE,
        env={**ENVIRONMENT, **places(spec.config), **limits, **os.environ, **spec.env},
    )


def places(config: EngineConfig) -> Mapping[str, str]:
    """Return the variables that bind compute threads to cores, if this engine has all cores."""
    threads = config.threads or usable_cores()
    whole = config.tensor_parallel_size == 1 and 1 < threads == usable_cores()
    return PLACES if whole and config.device in ("auto", "cpu") else {}


class EngineProcess:
    """Starts at once, with ``child`` if one was spawned for ``spec`` already.

    ``deliver`` gets every message, then ``ended`` gets the reason. Both are called on the event
    loop that was running at construction.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        deliver: Callable[[FromEngine], None],
        ended: Callable[[str], None],
        child: subprocess.Popen[bytes] | None = None,
    ) -> None:
        self._deliver = deliver
        self._ended = ended
        self._reason: str | None = None
        self._loop = asyncio.get_running_loop()
        self._folder = PrivateFolder()
        self._decode = engine_answers()
        self._open_sockets()
        self.exited = asyncio.Event()
        try:
            self._child = child or spawn(spec)
            self._launch(spec)
            threading.Thread(target=self._reap, name="engine-reaper", daemon=True).start()
        except (OSError, RuntimeError):
            self._close_sockets()
            raise

    @property
    def pid(self) -> int:
        return self._child.pid

    def send(self, message: ToEngine) -> None:
        """Never blocks; a message to a child that has exited is dropped."""
        if not self._out.closed:
            self._out.send(encode(message), zmq.NOBLOCK)

    def kill(self) -> None:
        self._child.kill()

    async def stop(self, grace_seconds: float) -> None:
        """Ask the child to leave, and kill it if it does not."""
        self.send(Shutdown())
        try:
            async with asyncio.timeout(grace_seconds):
                await self.exited.wait()
        except TimeoutError:
            self.kill()
            await self.exited.wait()

    def _open_sockets(self) -> None:
        """Each side binds the socket that it reads, so a send always has a peer to queue to."""
        self._inbound = f"ipc://{self._folder.path / 'engine'}"
        self._outbound = f"ipc://{self._folder.path / 'server'}"
        self._context = zmq.Context()
        self._in = self._context.socket(zmq.PULL)
        self._out = self._context.socket(zmq.PUSH)
        for socket in (self._in, self._out):
            socket.set_hwm(0)
            socket.linger = 0
        self._in.bind(self._outbound)
        self._out.connect(self._inbound)
        self._loop.add_reader(self._in.fileno(), self._read)

    def _launch(self, spec: EngineSpec) -> None:
        launch = Launch(
            config=spec.config,
            inbound=self._inbound,
            outbound=self._outbound,
            log_level=spec.log_level,
            log_format=spec.log_format,
        )
        tell(self._child, launch)

    def _read(self) -> None:
        # ZeroMQ's descriptor is edge-triggered: read until there is nothing more.
        while not self._in.closed:
            try:
                frame = self._in.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = self._decode(frame)
            except WireError as error:
                self._fail(frame, error)
                continue
            if isinstance(message, EngineFailed):
                self._reason = message.error
            self._deliver(message)

    def _fail(self, frame: bytes, error: WireError) -> None:
        """A message that is not valid, by a fault in the engine, ends the request it is about."""
        log.error("a message from the engine is not valid: %s", error)
        id = named_request(frame)
        if id is not None:
            self._deliver(Output(id=id, tokens=[], finish_reason="error", error=str(error)))

    def _reap(self) -> None:
        status = self._child.wait()
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._on_exit, status)

    def _on_exit(self, status: int) -> None:
        self._read()
        if status > 0 and self._reason is None:
            self._loop.call_later(LAST_WORDS_SECONDS, self._finish, status)
        else:
            self._finish(status)

    def _finish(self, status: int) -> None:
        self._read()
        self._close()
        self.exited.set()
        self._ended(self._reason or _describe(status))

    def _close(self) -> None:
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        self._close_sockets()

    def _close_sockets(self) -> None:
        self._loop.remove_reader(self._in.fileno())
        self._in.close()
        self._out.close()
        self._context.term()
        self._folder.remove()


def _describe(status: int) -> str:
    if status < 0:
        return f"the engine process was killed by {signal.Signals(-status).name}"
    return f"the engine process exited with status {status}"
