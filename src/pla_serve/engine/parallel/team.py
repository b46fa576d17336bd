"""Processes of the other ranks: rank 0 starts and watches them, and they end with it."""

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

from pla_serve.engine.child import PrivateFolder, tell
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.parallel.commands import Command, CommandSender, End
from pla_serve.engine.parallel.ranks import TorchRanks
from pla_serve.logs import LogFormat, in_use

log = logging.getLogger(__name__)

PATROL_SECONDS = 0.5
"""Pause between two checks of an idle engine that the other ranks still run."""
STUCK_SECONDS = 5.0
"""Longest time in which rank 0 notices the end of a rank; it may be waiting for that rank."""
STARTING_SECONDS = 120.0
"""As STUCK_SECONDS while rank 0 loads, which takes long."""
LAST_WORDS_SECONDS = 2.0
"""Time for which rank 0 waits, after a failed exchange, for the end of the rank to blame."""
LEAVE_SECONDS = 5.0
"""Time in which ranks have to end after `End`."""


class RankLost(Exception):
    """Another rank has ended, so nothing can be computed; the message says which, and why."""


class FollowerLaunch(msgspec.Struct, frozen=True, kw_only=True):
    """Launch of a rank: one line of JSON that rank 0 writes to its standard input."""

    config: EngineConfig
    """Config of the engine, with the path at which rank 0 found the model."""
    rank: int
    folder: str
    log_level: str
    log_format: LogFormat


class LastWords(msgspec.Struct, frozen=True, kw_only=True):
    """Error of a rank that fails: one line of JSON on its standard output."""

    error: str


class Team:
    """The other ranks of an engine, as rank 0 sees them; the constructor starts them.

    They run as long as their standard input is open, so they end with this process, in whatever way
    it ends. If one of them ends earlier, `check` and `blamed` raise. If this process calls neither,
    because it waits for that very rank, ``stuck`` is called.

    Args:
        program: arguments of the Python interpreter for the other ranks.
        stuck: called with the reason; by default it ends this process.
        stuck_seconds: how long this process may take to notice the end of a rank, until `serve`.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        program: tuple[str, ...] = ("-m", "pla_serve.engine.host.follower"),
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
        """Process ids of ranks 1 and up."""
        return [child.pid for child in self._children]

    def meet(self, device: torch.device) -> TorchRanks:
        """Wait for the other ranks and join their process group.

        Raises:
            RankLost: one of them has ended.
        """
        self._ranks = TorchRanks(self.folder, 0, self.size, device, self.check)
        return self._ranks

    def serve(self) -> None:
        """Loading is over: from now on rank 0 has STUCK_SECONDS to notice the end of a rank."""
        self._stuck_seconds = STUCK_SECONDS

    def send(self, command: Command) -> None:
        """See `SendCommand`. Raises RankLost."""
        self.check()
        self._commands(command)

    def check(self) -> None:
        """Raise RankLost if another rank has ended."""
        if self._lost is not None:
            self._noticed.set()
            raise RankLost(self._lost)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Turn errors inside that come from the end of another rank into RankLost.

        After any error the other ranks are ended, because they cannot go on alone.
        """
        try:
            self.check()
            yield
        except BaseException as error:
            # An exchange fails some time before the process of the lost rank has ended.
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
        """Return ``pause``, shortened so that an idle engine checks its ranks often enough."""
        return PATROL_SECONDS if pause is None else min(pause, PATROL_SECONDS)

    def close(self, kill: bool = False) -> None:
        """Let the other ranks end, or kill them, and wait until they have ended."""
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
            log_level=level if level == "DEBUG" else "WARNING",  # rank 0 logs the rest for all
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
    """End this process, whose main thread waits for a rank that has ended."""
    log.critical("%s, and rank 0 waits for it; the engine ends", reason)
    os._exit(1)
