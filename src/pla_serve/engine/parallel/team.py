"""The processes of the other ranks: rank 0 starts them, watches them, and ends with them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec
import torch

from pla_serve.engine.config import EngineConfig
from pla_serve.engine.host.child import PrivateFolder, tell
from pla_serve.engine.parallel.commands import Command, CommandSender, End
from pla_serve.engine.parallel.ranks import TorchRanks
from pla_serve.logs import LogFormat, in_use

log = logging.getLogger(__name__)

PATROL_SECONDS = 0.5
"""How often an idle engine looks whether the other ranks live."""
STUCK_SECONDS = 5.0
"""How long rank 0 may take to notice that a rank has ended: it may be waiting for that rank."""
STARTING_SECONDS = 120.0
"""The same while it loads: it looks for the others when it has."""
LAST_WORDS_SECONDS = 2.0
"""How long after a failed exchange the end of a rank may come to light."""
LEAVE_SECONDS = 5.0
"""How long ranks may take to leave when they are asked to."""


class RankLost(Exception):
    """Another rank has ended, so nothing can be computed any more; says which, and why."""


class FollowerLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 writes to another rank's standard input, as one line of JSON."""

    config: EngineConfig
    """With the model where rank 0 found it."""
    rank: int
    folder: str
    log_level: str
    log_format: LogFormat


class LastWords(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank that fails writes to its standard output, as one line of JSON."""

    error: str


class Team:
    """All ranks of one engine, seen from rank 0. Starts the others at once.

    They run as long as their standard input is open, so they end with this process, however it
    ends. If one of them ends before that, `check` and `blamed` raise; and if this process does not
    come to call them, because it waits for that rank, ``stuck`` is called.

    Args:
        program: what the others run, after the Python interpreter.
        stuck: by default ends this process.
        stuck_seconds: how long this process may take to notice the end of a rank, until `serve`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        program: tuple[str, ...] = ("-m", "pla_serve.engine.parallel.follower"),
        stuck: Callable[[str], None] | None = None,
        stuck_seconds: float = STARTING_SECONDS,
    ) -> None:
        self.size = config.tensor_parallel_size
        self._stuck = stuck or _end_process
        self._stuck_seconds = stuck_seconds
        self._private = PrivateFolder()
        self.folder = self._private.path
        self._lost: str | None = None
        self._noticed = threading.Event()
        self._closing = False
        self._ranks: TorchRanks | None = None
        self._commands = CommandSender(self.folder, self.size)
        self._children = [self._start(config, rank, program) for rank in range(1, self.size)]

    @property
    def pids(self) -> list[int]:
        """Of the processes of ranks 1 and up."""
        return [child.pid for child in self._children]

    def meet(self, device: torch.device) -> TorchRanks:
        """Wait for the others and join their process group.

        Raises:
            RankLost: one of them has ended.
        """
        self._ranks = TorchRanks(self.folder, 0, self.size, device, self.check)
        return self._ranks

    def serve(self) -> None:
        """From now on, the end of a rank is noticed soon or never."""
        self._stuck_seconds = STUCK_SECONDS

    def send(self, command: Command) -> None:
        """See `Sender`. Raises RankLost."""
        self.check()
        self._commands(command)

    def check(self) -> None:
        """Raises RankLost if another rank has ended."""
        if self._lost is not None:
            self._noticed.set()
            raise RankLost(self._lost)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """A failure inside that comes from a lost rank says so: RankLost in its place.

        After any failure the others are ended: they do not know how to go on.
        """
        try:
            self.check()
            yield
        except BaseException as error:
            # A collective fails when its peer is gone, some time before that process has ended.
            deadline = time.monotonic() + LAST_WORDS_SECONDS
            while (
                isinstance(error, RuntimeError)
                and self._lost is None
                and time.monotonic() < deadline
            ):
                time.sleep(0.01)
            lost = self._lost
            self.close(kill=True)
            if isinstance(error, RuntimeError) and lost is not None:
                raise RankLost(lost) from error
            raise

    def at_most(self, pause: float | None) -> float:
        """How long the engine may be left alone: an idle one has to look after its ranks."""
        return PATROL_SECONDS if pause is None else min(pause, PATROL_SECONDS)

    def close(self, kill: bool = False) -> None:
        """Have the others leave, or end them, and wait until they have."""
        if self._closing:
            return
        self._closing = True
        self._noticed.set()
        kill = kill or self._ranks is None or self._lost is not None
        if not kill:
            self._commands(End())
        if self._ranks is not None:
            self._ranks.close(alone=kill)
        self._commands.close(0.0 if kill else LEAVE_SECONDS)
        for child in self._children:
            if kill:
                child.kill()
            try:
                child.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            assert child.stdin is not None
            with suppress(BrokenPipeError):
                child.stdin.close()
        self._private.remove()

    def _start(
        self, config: EngineConfig, rank: int, program: tuple[str, ...]
    ) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, *program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        level, form = in_use()
        launch = FollowerLaunch(
            config=config,
            rank=rank,
            folder=str(self.folder),
            log_level=level if level == "DEBUG" else "WARNING",  # the rest is what rank 0 says
            log_format=form,
        )
        tell(child, launch)
        threading.Thread(
            target=self._watch, args=(rank, child), name=f"rank-{rank}-watch", daemon=True
        ).start()
        return child

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        with child.stdout as output:
            words = output.read()
        status = child.wait()
        if self._closing:
            return
        self._lost = f"rank {rank} of {self.size} ended: {_reason(words, status)}"
        log.error(self._lost)
        if not self._noticed.wait(self._stuck_seconds):
            self._private.remove()
            self._stuck(self._lost)


def _reason(words: bytes, status: int) -> str:
    lines = words.splitlines()
    with suppress(msgspec.MsgspecError, IndexError):
        return msgspec.json.decode(lines[-1], type=LastWords).error
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _end_process(reason: str) -> None:
    """Whatever the main thread waits for will not come."""
    log.critical("%s, and rank 0 waits for it; the engine ends", reason)
    os._exit(1)
