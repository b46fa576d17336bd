"""The side of a process that uses grammar workers: starts, watches and ends them.

    host = GrammarHost(vocabulary_of(tokenizer, vocab_size), GrammarLimits())
    worker = host.fork()
    worker.frames.send(Open(0, Grammar("regex", "a+"), []))
    ...                             # wait until host.control or worker.frames.socket can be read
    host.poll()                     # sets worker.end if it has ended
    for message in worker.receive(): ...

Nothing here blocks, and all of it belongs to one thread.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pla_serve.cores import on_any_core
from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.limits import GrammarLimits
from pla_serve.grammar.messages import (
    Exited,
    Fork,
    Forked,
    Frames,
    FromNursery,
    FromWorker,
    Kill,
    NurseryLaunch,
    Slow,
    Watch,
)
from pla_serve.grammar.tokenizer import GrammarVocabulary
from pla_serve.grammar.watch import LOW_PRIORITY, cpu_seconds

log = logging.getLogger(__name__)

WATCH_AGAIN_SECONDS = 0.1
"""Least time between two `Watch` messages."""
NOT_NEEDED = "it is needed no longer"
MOST_FAILED_STARTS = 3
"""Nurseries in a row that may end without forking a worker, before no other one is started."""


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """End of a worker, and its reason."""

    status: int | None
    """Exit status, or minus the signal that ended the worker; None if unknown."""
    killed_for: str | None = None
    """Reason for which this process killed the worker; None if it did not."""
    working: int = 0
    """Text that the worker computed for; 0 for none, or if unknown."""

    @property
    def certain(self) -> bool:
        """Whether the same grammar would end another worker in the same way."""
        sure = (signal.SIGPROF, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
        return self.killed_for is None and self.status is not None and -self.status in sure

    def cause(self, limits: GrammarLimits, seconds: float) -> str:
        """Return the cause for the client whose grammar the worker was computing.

        Args:
            seconds: of CPU time that the work was allowed.
        """
        if self.killed_for is not None:
            return self.killed_for
        if self.status is None:
            return "the process that follows it was lost"
        if self.status == -signal.SIGPROF:
            return f"it takes more than {seconds:g} s of CPU time; simplify it"
        if self.status == -signal.SIGUSR1:
            return (
                f"all grammars together need more than {limits.total_bytes >> 20} MiB of memory, "
                "and this one has the most; simplify it, or try again later"
            )
        if self.status == -signal.SIGABRT:
            return f"it needs more than {limits.memory_bytes >> 20} MiB of memory; simplify it"
        if self.status in (-signal.SIGSEGV, -signal.SIGBUS):
            return "it is too deep for the compiler, which overflowed its stack; nest it less"
        name = signal.Signals(-self.status).name if self.status < 0 else f"status {self.status}"
        return f"the process that follows it ended with {name}"


class GrammarWorker:
    """One worker, from its fork to its end."""

    def __init__(self, id: int, sock: socket.socket) -> None:
        self.id = id
        self.frames = Frames(sock, FromWorker)
        self.pid: int | None = None
        """Process id; None until the worker runs."""
        self.end: WorkerEnd | None = None
        """How the worker ended; None until then. Its last messages can still be read."""
        self.killed_for: str | None = None
        self.niceness = 0
        self.slow_for: int | None = None
        """Text for which it was found to compute for long; whoever reads it sets it to None."""

    def receive(self) -> Iterator[Any]:
        """Yield the messages that the worker has sent so far."""
        while self.frames.read():
            yield from self.frames.messages()


class GrammarHost:
    """Workers for one vocabulary, and the nursery that forks them; a lost one is replaced.

    Raises:
        OSError: the nursery cannot be started.
    """

    def __init__(self, vocabulary: GrammarVocabulary, limits: GrammarLimits) -> None:
        self.limits = limits
        self.workers: dict[int, GrammarWorker] = {}
        """Workers that run, by their number."""
        self._launch = NurseryLaunch(vocabulary.size, sorted(vocabulary.eos_token_ids), limits)
        self._tokenizer = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this
        self._tokenizer.write(vocabulary.tokenizer_json.encode())
        self._tokenizer.flush()
        self._forks = 0
        self._failed_starts = 0
        self._watch_asked = -1.0
        self._start()

    @property
    def control(self) -> socket.socket:
        """Socket that is readable when `poll` has something to do. A new nursery has a new one."""
        return self._control.socket

    @property
    def nursery_pid(self) -> int:
        """Process id of the nursery, which forks the workers."""
        return self._child.pid

    @property
    def control_lost(self) -> bool:
        """Whether the nursery is gone; `fork` then starts another one."""
        return self._control.ended

    def fork(self) -> GrammarWorker:
        """Fork a worker. Messages that are sent to it before it runs wait in its socket.

        Raises:
            GrammarError: nurseries do not start on this machine.
        """
        if self._control.ended:
            self._restart()
        ours, its = socket.socketpair()
        ours.setblocking(False)
        self._forks += 1
        worker = GrammarWorker(self._forks, ours)
        self.workers[worker.id] = worker
        with its:
            self._control.send(Fork(worker.id), its.fileno())
        return worker

    def kill(self, worker: GrammarWorker, reason: str = NOT_NEEDED) -> None:
        """End a worker at once; its ``end`` is set when it is gone.

        Args:
            reason: for the client of whatever it was busy with.
        """
        if worker.end is None and worker.killed_for is None:
            worker.killed_for = reason
            self._control.send(Kill(worker.id))

    def lower_priority(self, worker: GrammarWorker, niceness: int = LOW_PRIORITY) -> None:
        """Run a worker at low priority from now on."""
        worker.niceness = max(worker.niceness, niceness)
        if worker.pid is not None:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, worker.pid, worker.niceness)

    def cpu_seconds(self, worker: GrammarWorker) -> float:
        """Return the CPU time that a worker has taken so far.

        Where the system does not report it, this is a clock, as if the worker never paused.
        """
        found = cpu_seconds(worker.pid)
        return time.monotonic() if found is None else found

    def watch(self) -> None:
        """Have long work of workers found for a while. It runs at low priority then."""
        now = time.monotonic()
        if now - self._watch_asked > WATCH_AGAIN_SECONDS and not self._control.ended:
            self._watch_asked = now
            self._control.send(Watch())

    def poll(self) -> None:
        """Update which workers run and which have ended."""
        while self._control.read():
            for message in self._control.messages():
                self._take(message)
        if self._control.ended and self.workers:
            self._lose()

    def close(self) -> None:
        """End all workers."""
        self._control.socket.close()
        self._child.wait()
        for worker in self.workers.values():
            worker.frames.socket.close()
        self.workers.clear()
        self._tokenizer.close()

    def _take(self, message: Forked | Exited | Slow) -> None:
        if isinstance(message, Slow):
            if message.id in self.workers:
                self.workers[message.id].slow_for = message.working
            return
        if isinstance(message, Forked):
            self._failed_starts = 0
            worker = self.workers[message.id]
            worker.pid = message.pid
            if worker.niceness:
                self.lower_priority(worker, worker.niceness)
            return
        worker = self.workers.pop(message.id)
        worker.end = WorkerEnd(message.status, worker.killed_for, message.working)

    def _lose(self) -> None:
        """End all workers of a nursery that is gone, which would not be ended otherwise."""
        log.error("the grammar nursery was lost with %d workers", len(self.workers))
        for worker in self.workers.values():
            worker.end = WorkerEnd(None, worker.killed_for)
            if worker.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)
        self.workers.clear()

    def _restart(self) -> None:
        if self.workers:
            self._lose()
        self._control.socket.close()
        self._child.kill()
        self._child.wait()
        self._failed_starts += 1
        if self._failed_starts > MOST_FAILED_STARTS:
            raise GrammarError("structured output is off: its process does not start; see the log")
        self._start()

    def _start(self) -> None:
        ours, its = socket.socketpair()
        with its, on_any_core():
            self._child = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "pla_serve.grammar.nursery",
                    str(its.fileno()),
                    str(self._tokenizer.fileno()),
                ],
                pass_fds=(its.fileno(), self._tokenizer.fileno()),
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        ours.setblocking(False)
        self._control = Frames(ours, FromNursery)
        self._control.send(self._launch)


def _environment() -> dict[str, str]:
    """Return this process's environment without its allocator settings.

    With large pages, forks would copy each page as a whole.
    """
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    return {**kept, "RAYON_NUM_THREADS": "1"}
