"""Forks grammar workers: ``python -m pla_serve.grammar.nursery CONTROL TOKENIZER``.

It loads the library and the vocabulary once, and computes nothing itself; a worker is a fork of it
and is there within milliseconds. The arguments are two descriptors: a stream socket to the process
that uses the workers, and a file with the tokenizer. It ends, with all workers, when the socket is
closed, however that process ended. SIGINT and SIGTERM are ignored, as the engine ignores them.
"""

from __future__ import annotations

import gc
import mmap
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress

from pla_serve.grammar.compiler import GrammarCompiler
from pla_serve.grammar.limits import GRAMMARS_A_WORKER, GrammarLimits
from pla_serve.grammar.messages import (
    Exited,
    Fork,
    Forked,
    Frames,
    Kill,
    NurseryLaunch,
    Slow,
    ToNursery,
    Watch,
)
from pla_serve.grammar.tokenizer import GrammarVocabulary
from pla_serve.grammar.watch import NOTE, WorkerWatch
from pla_serve.grammar.worker import Worker, confine

TICK_SECONDS = 0.005
"""Time between two looks at workers that are watched."""
WATCH_SECONDS = 0.5
"""Time for which workers are watched after a `Watch`, and after they were last seen to work."""


class Nursery:
    """Forks, watches and ends workers, by the numbers that the other side gives them."""

    def __init__(
        self, control: socket.socket, compiler: GrammarCompiler, limits: GrammarLimits
    ) -> None:
        self._control = Frames(control, ToNursery)
        self._compiler = compiler
        self._limits = limits
        self._pids: dict[int, int] = {}
        self._ids: dict[int, int] = {}
        self._watch = WorkerWatch(limits)
        self._watch_until = 0.0
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        """Serve until the other side closes the socket."""
        descriptors: list[int] = []
        control = self._control.socket
        while True:
            ready, _, _ = select.select([control.fileno(), self._wake_read], [], [], self._look())
            if self._wake_read in ready:
                with suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
                self._reap()
            if control.fileno() not in ready:
                continue
            self._control.read(descriptors)
            if self._control.ended:
                for pid in self._ids:
                    os.kill(pid, signal.SIGKILL)
                return
            for message in self._control.messages():
                if isinstance(message, Fork):
                    self._fork(message.id, descriptors.pop(0))
                elif isinstance(message, Watch):
                    self._watch_until = time.monotonic() + WATCH_SECONDS
                elif isinstance(message, Kill) and message.id in self._pids:
                    os.kill(self._pids[message.id], signal.SIGKILL)

    def _look(self) -> float | None:
        """Look at workers that are watched; return the seconds until they are looked at again."""
        now = time.monotonic()
        if now >= self._watch_until:
            return None
        for id, text in self._watch.slow():
            self._control.send(Slow(id, text))
        largest = self._watch.largest_beyond_budget()
        if largest is not None:
            os.kill(largest, signal.SIGUSR1)
        if self._watch.any_works:
            self._watch_until = now + WATCH_SECONDS
        return TICK_SECONDS

    def _fork(self, id: int, descriptor: int) -> None:
        note = mmap.mmap(-1, NOTE.size)  # shared with the worker
        try:
            pid = os.fork()
        except OSError:
            os.close(descriptor)
            self._control.send(Exited(id, os.EX_OSERR, 0))
            return
        if pid == 0:
            self._become_worker(descriptor, note)
        self._watch.add(id, pid, note)
        os.close(descriptor)
        self._pids[id], self._ids[pid] = pid, id
        self._control.send(Forked(id, pid))

    def _become_worker(self, descriptor: int, note: mmap.mmap) -> None:
        status = os.EX_SOFTWARE
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.socket.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            gc.enable()
            confine(self._limits)
            with socket.socket(fileno=descriptor) as sock:
                Worker(sock, self._compiler, self._limits, note).serve()
            status = os.EX_OK
        except MemoryError:
            os.kill(os.getpid(), signal.SIGABRT)  # as the library ends without memory
        finally:
            os._exit(status)

    def _reap(self) -> None:
        while self._ids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            id = self._ids.pop(pid)
            del self._pids[id]
            working = self._watch.remove(id)
            self._control.send(Exited(id, os.waitstatus_to_exitcode(status), working))


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=int(sys.argv[1]))
    control.setblocking(True)
    launch = _launch(control)
    if launch is None:
        return 1
    tokenizer = int(sys.argv[2])
    with os.fdopen(tokenizer, "rb") as file:
        text = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()
    ends = frozenset(launch.eos_token_ids)
    vocabulary = GrammarVocabulary(text, launch.vocab_size, ends)
    compiler = GrammarCompiler(vocabulary, limits=launch.limits, cache_size=GRAMMARS_A_WORKER)
    del text, vocabulary
    gc.collect()
    gc.freeze()  # pages that workers share stay shared
    gc.disable()
    Nursery(control, compiler, launch.limits).run()
    return 0


def _launch(control: socket.socket) -> NurseryLaunch | None:
    """The first message, and not a byte more; None if the other side is gone."""
    head = control.recv(4, socket.MSG_WAITALL)
    if len(head) < 4:
        return None
    import msgspec

    size = int.from_bytes(head, "little")
    body = control.recv(size, socket.MSG_WAITALL)
    return msgspec.msgpack.decode(body, type=NurseryLaunch) if len(body) == size else None


if __name__ == "__main__":
    sys.exit(main())
