"""Child process of a supervisor, with its log."""

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
"""Longest line of a log; longer ones are cut into pieces."""
PR_SET_PDEATHSIG = 1


class Child:
    """A child process in a session of its own, so that Ctrl-C reaches its parent alone.

    On Linux the child gets SIGTERM when its parent dies in any way. Use `start` to make one.
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
        """Start a program.

        Args:
            command: its words.
            env: variables added to the environment.
            on_line: called with each line that the process writes.
            fds: file descriptors that stay open in the process.

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
        """Id of the process."""
        return self._process.pid

    async def wait(self) -> int:
        """Wait for the end of the process and of its log.

        Returns:
            The exit status, or minus the signal that ended the process.
        """
        status = await self._process.wait()
        # A grandchild may hold the pipes open for longer; nobody waits for that.
        await asyncio.wait(self._logs, timeout=1.0)
        for log in self._logs:
            log.cancel()
        return status

    def ask(self) -> None:
        """Send SIGTERM, so that the process drains and ends; a stopped process is woken for it."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Send SIGKILL to the process and to all processes that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)


def die_with_parent() -> Callable[[], object] | None:
    """Return a function that a forked child calls so that it gets SIGTERM when its parent dies.

    The C library is looked up here, because that is not safe in a forked child. None where the
    system has no such call.
    """
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
