"""A transport under a test's control: reads arrive late, in pieces, in any order, or never."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from pla_serve.engine.transfer.layout import Copy
from pla_serve.engine.transfer.transport import TransportError

PIECE = 256
"""Most bytes that arrive at once."""


@dataclass
class Read:
    """One operation: its bytes are copied when the wire says so, from what is there *then*."""

    reader: str
    agent: str
    left: list[Copy]
    failed: bool = False

    def done(self) -> bool:
        if self.failed:
            raise TransportError("the wire was cut")
        return not self.left


@dataclass
class Wire:
    """Between all engines of a test, which share this process's memory."""

    alive: set[str] = field(default_factory=set)
    reads: list[Read] = field(default_factory=list)
    on_write: list[Callable[[str, Copy], None]] = field(default_factory=list)
    """Called before bytes are written to an engine's memory."""
    stuck: set[str] = field(default_factory=set)
    """Agents whose memory cannot be read for now."""

    def deliver(self, rng: Random, most: int = 8) -> None:
        """Let some pieces of some reads arrive; reads from or by the dead fail, sooner or later."""
        for read in rng.sample(self.reads, min(len(self.reads), 3)):
            if read.agent not in self.alive and rng.random() < 0.5:
                self._fail(read)
            elif read.agent in self.alive and read.agent not in self.stuck:
                self._copy(read, rng.randint(1, most), rng)

    def settle(self) -> None:
        """Everything arrives, or fails."""
        for read in list(self.reads):
            if read.agent not in self.alive:
                self._fail(read)
            elif read.agent not in self.stuck:
                while read in self.reads:
                    self._copy(read, 1000, Random(0))

    def kill(self, name: str) -> None:
        """End an engine, and the reads that it began."""
        self.alive.discard(name)
        self.stuck.discard(name)
        self.reads = [read for read in self.reads if read.reader != name]

    def _fail(self, read: Read) -> None:
        read.failed = True
        self.reads.remove(read)

    def _copy(self, read: Read, pieces: int, rng: Random) -> None:
        for _ in range(min(pieces, len(read.left))):
            copy = read.left.pop(rng.randrange(len(read.left)))
            for check in self.on_write:
                check(read.reader, copy)
            ctypes.memmove(copy.local, copy.remote, copy.size)
        if not read.left:
            self.reads.remove(read)


class WireTransport:
    """One engine's end of a wire."""

    def __init__(self, wire: Wire, name: str) -> None:
        self._wire = wire
        self.name = name
        self.metadata = b"wire"
        wire.alive.add(name)

    def read(self, agent: str, metadata: bytes, copies: Sequence[Copy]) -> Read:
        if agent not in self._wire.alive:
            raise TransportError(f"{agent} is gone")
        pieces = [
            Copy(c.local + at, c.remote + at, min(PIECE, c.size - at))
            for c in copies
            for at in range(0, c.size, PIECE)
        ]
        read = Read(self.name, agent, pieces)
        self._wire.reads.append(read)
        return read

    def progress(self) -> None: ...
