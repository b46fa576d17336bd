"""A grammar worker: follows the texts of its grammars, and ends when its limits do."""

from __future__ import annotations

import mmap
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pla_serve.grammar.compiler import GrammarCompiler, GrammarMatcher
from pla_serve.grammar.errors import GrammarError
from pla_serve.grammar.limits import GrammarLimits
from pla_serve.grammar.messages import (
    Advance,
    Advanced,
    Close,
    Frames,
    GrammarMask,
    OpenGrammar,
    ToWorker,
)
from pla_serve.grammar.watch import NOTE


def confine(limits: GrammarLimits) -> None:
    """Bound this process, for good: its memory, and what it leaves behind when it crashes."""
    with suppress(OSError, ValueError):  # not every system has these
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        Path("/proc/self/oom_score_adj").write_text("1000")
    for what in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        with suppress(OSError, ValueError):
            resource.setrlimit(what, (0, 0))
    # What the library prints before it aborts would fill the log of the server.
    silent = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(silent, standard)


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """The kernel ends this process if the block takes more CPU time, wherever it is."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


class Worker:
    """Answers one socket until it is closed."""

    def __init__(
        self,
        sock: socket.socket,
        compiler: GrammarCompiler,
        limits: GrammarLimits,
        note: mmap.mmap,
    ) -> None:
        sock.setblocking(True)
        self._frames = Frames(sock, ToWorker)
        self._compiler = compiler
        self._limits = limits
        self._matchers: dict[int, GrammarMatcher] = {}
        self._unmasked: dict[int, None] = {}
        """Texts whose mask is to be computed, in order."""
        self._note = note
        self._works = 0
        """Number of pieces of work so far."""
        self._seconds = 0.0
        """CPU time of the last one."""

    def serve(self) -> None:
        """Go past all tokens that have come before any mask is computed: masks take longer."""
        while True:
            if not self._unmasked or self._has_input():
                self._frames.read()
                if self._frames.ended:
                    return
                self._take_all(list(self._frames.messages()))
                self._frames.flush()
            if self._unmasked:
                id = next(iter(self._unmasked))
                del self._unmasked[id]
                self._mask(id)

    def _has_input(self) -> bool:
        return bool(select.select([self._frames.socket], [], [], 0)[0])

    def _take_all(self, messages: list[ToWorker]) -> None:
        """Take messages, without the work for texts that are closed by a later one of them."""
        closed = {message.id for message in messages if isinstance(message, Close)}
        for message in messages:
            if message.id in closed and not isinstance(message, Close):
                self._frames.put(Advanced(message.id, None, False))
            else:
                self._take(message)

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, OpenGrammar):
            self._open(message)
        elif isinstance(message, Advance):
            matcher = self._matchers.get(message.id)
            if matcher is None:  # it has failed meanwhile
                self._frames.put(Advanced(message.id, None, False))
                return
            with self._work(message.id, self._limits.step_seconds):
                matcher.advance(message.token)
            self._advanced(message.id, matcher, self._seconds)
        elif isinstance(message, Close):
            self._matchers.pop(message.id, None)
            self._unmasked.pop(message.id, None)

    def _open(self, message: OpenGrammar) -> None:
        with self._work(message.id, self._limits.replay_seconds(len(message.tokens))):
            try:
                matcher = self._compiler.start(message.grammar)
                if not message.tokens:
                    matcher.first_mask()
            except GrammarError as error:
                self._frames.put(Advanced(message.id, str(error), False))
                return
            for token in message.tokens:
                if matcher.advance(token) is not None:
                    break
        self._matchers[message.id] = matcher
        self._advanced(message.id, matcher, 0.0)

    @contextmanager
    def _work(self, id: int, seconds: float) -> Iterator[None]:
        """Note whom the work is for, in case that it is the last one, and bound its CPU time."""
        self._works += 1
        NOTE.pack_into(self._note, 0, id, self._works)
        begin = time.process_time()
        with cpu_limit(seconds):
            yield
        self._seconds = time.process_time() - begin
        NOTE.pack_into(self._note, 0, 0, self._works)

    def _advanced(self, id: int, matcher: GrammarMatcher, seconds: float) -> None:
        self._frames.put(Advanced(id, matcher.error, matcher.finished, seconds))
        if matcher.error is None:
            self._unmasked[id] = None

    def _mask(self, id: int) -> None:
        matcher = self._matchers[id]
        self._seconds = 0.0
        if matcher.must_stop:
            bits = self._compiler.eos_mask.to_bytes(self._compiler.mask_bytes, "little")
        else:
            with self._work(id, self._limits.step_seconds):
                bits = matcher.mask()
        self._frames.send(GrammarMask(id, matcher.error, matcher.must_stop, bits, self._seconds))
