"""One child process: its start, its log, its end."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

LINE_BYTES = 2**20
"""A longer line of a log is cut into pieces."""
PR_SET_PDEATHSIG = 1


class Child:
    """A process in a session of its own, so that Ctrl-C reaches its parent alone.

    It gets SIGTERM when this process dies, however it dies (Linux). Use `start`.
    """

    def __init__(self, process: asyncio.subprocess.Process, logs: Sequence[asyncio.Task[None]]):
        self._process = process
        self._logs = logs

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        env: Mapping[str, str],
        on_line: Callable[[str], None],
        fds: Sequence[int] = (),
    ) -> Child:
        """``on_line`` gets what the process writes, line by line; ``fds`` stay open in it.

        Raises:
            OSError: the program cannot be started.
        """
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **env},
            start_new_session=True,
            preexec_fn=die_with_parent(),
            limit=LINE_BYTES,
            pass_fds=fds,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        logs = [
            asyncio.create_task(_read(stream, on_line))
            for stream in (process.stdout, process.stderr)
        ]
        return cls(process, logs)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Its status once it has ended, minus the signal if one ended it; its log is complete."""
        status = await self._process.wait()
        # A grandchild may hold the pipes open a moment longer, and is not waited for.
        await asyncio.wait(self._logs, timeout=1.0)
        for log in self._logs:
            log.cancel()
        return status

    def ask(self) -> None:
        """SIGTERM: drain and leave. A stopped process is woken for it."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, for it and for all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)


def die_with_parent() -> Callable[[], object] | None:
    """What the child does before it becomes the program; the library is looked up here, because
    a forked child had better not."""
    if sys.platform != "linux":
        return None
    return partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)


async def _read(stream: asyncio.StreamReader, on_line: Callable[[str], None]) -> None:
    while True:
        try:
            line = await stream.readuntil(b"\n")
        except asyncio.IncompleteReadError as end:
            line = end.partial
            if not line:
                return
        except asyncio.LimitOverrunError as long:
            line = await stream.read(long.consumed)
        on_line(line.decode(errors="replace").rstrip("\n"))
