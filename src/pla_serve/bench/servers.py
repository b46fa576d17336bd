"""Servers to measure: one that is running already, or a fresh one for each run."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import IO

import httpx

from pla_serve.policy.knobs import split_knobs
from pla_serve.policy.registry import POLICIES

START_SECONDS = 600.0
"""Longest time that a server may take to start; the first start may fetch and convert a model."""
STOP_SECONDS = 45.0
"""Longest time that a server may take to stop; a little more than its drain."""

_NAME = re.compile(r"[a-z][a-z0-9_-]*")


class ServerError(RuntimeError):
    """Raised if a server did not start or does not answer; the message says what to do."""


@dataclass(frozen=True, slots=True)
class ServerEntry:
    """A policy with knobs, such as ``fcfs:max-batch-tokens=512``, and the flags of its server."""

    label: str
    flags: tuple[str, ...]


Open = Callable[[ServerEntry], AbstractContextManager[str]]
"""Makes a context that yields the base URL of a server for an entry."""


def parse_entries(text: str) -> tuple[ServerEntry, ...]:
    """Read entries that are separated by commas.

    Raises:
        ValueError: an entry is malformed or is named twice.
    """
    entries = tuple(_parse_entry(part.strip()) for part in text.split(","))
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{label} is compared with itself; use --repeat to measure it again")
    return entries


def _parse_entry(text: str) -> ServerEntry:
    policy, knobs = split_knobs(text)
    if not _NAME.fullmatch(policy):
        raise ValueError(f"an entry starts with a policy's name, as in fcfs: {text!r}")
    kind = POLICIES.get(policy)
    own = kind.knobs.keys() - kind.settings if kind is not None else set()
    spec, flags = policy, []
    for name, value in knobs:
        if not _NAME.fullmatch(name) or value == "":
            raise ValueError(f"a knob is a flag of serve, as in max-batch-tokens=512: {text!r}")
        flag = name.replace("_", "-")
        if name in own:
            spec += f":{flag}" if value is None else f":{flag}={value}"
        else:
            flags += [f"--{flag}", *([] if value is None else [value])]
    return ServerEntry(text, ("--policy", spec, *flags))


def running(base_url: str) -> Open:
    """Use the server at ``base_url`` for every entry, and leave it running."""

    @contextmanager
    def open_server(entry: ServerEntry) -> Iterator[str]:
        yield base_url

    return open_server


def fresh(serve_args: Sequence[str]) -> Open:
    """Start a new ``pla-serve serve`` for each run, on a free port of the loopback interface."""

    @contextmanager
    def open_server(entry: ServerEntry) -> Iterator[str]:
        port = free_port()
        command = [sys.executable, "-m", "pla_serve", "serve", *serve_args, *entry.flags]
        with started([*command, "--port", str(port)], f"http://127.0.0.1:{port}") as server:
            yield server.url

    return open_server


def free_port() -> int:
    """Return a TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Started:
    """A running server that we started, in a process group of its own."""

    url: str
    pid: int

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the server and its children meanwhile, so that they use no processor time."""
        os.killpg(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.pid, signal.SIGCONT)


@contextmanager
def started(
    command: Sequence[str],
    url: str,
    *,
    ready: str = "/ready",
    environment: dict[str, str] | None = None,
    seconds: float = START_SECONDS,
) -> Iterator[Started]:
    """Run a server until the block ends; then SIGTERM, and SIGKILL if it does not drain.

    The server gets a process group of its own, so that Ctrl-C reaches the bench alone.

    Raises:
        ServerError: the server ended or was not ready in time; the message has the end of its log.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            problem = _wait_until_ready(process, url + ready, seconds)
            if problem:
                raise ServerError(f"the server {problem}. {_tail(log)}")
            yield Started(url, process.pid)
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, seconds: float) -> str | None:
    """Return what went wrong, or None once the server is ready."""
    end = time.monotonic() + seconds
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                return f"ended with status {process.returncode} before it was ready"
            try:
                if client.get(url).status_code == 200:
                    return None
            except httpx.TransportError:
                pass
            time.sleep(0.1)
    return f"was not ready after {seconds:.0f} s"


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: IO[bytes], lines: int = 12) -> str:
    log.seek(0)
    end = log.read().decode(errors="replace").strip().splitlines()[-lines:]
    return "Its log ends with:\n" + "\n".join(end) if end else "It wrote no log."
