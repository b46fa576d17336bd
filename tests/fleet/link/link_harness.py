"""What the tests of links share: a recorder of events, and instances as processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from pla_serve.fleet.link.liveness import Backoff
from pla_serve.fleet.link.own import InstanceLink
from pla_serve.fleet.link.protocol import (
    InstanceFacts,
    InstanceReport,
    Link,
    LinkEvents,
    LossCause,
    RequestAnswer,
)
from pla_serve.wire.engine import Accepted, AddRequest, Output, Rejected, SamplingParams
from tests.server.server_harness import DEADLINE, ENGINE_PATH

FAST = Backoff(0.01, 0.05)


class Recorder:
    """`LinkEvents` that remember, and wait for what is to come."""

    def __init__(self) -> None:
        self.boots: list[str] = []
        self.reports: list[InstanceReport] = []
        self.losses: list[str] = []
        self.causes: list[LossCause] = []
        self.messages: list[RequestAnswer] = []
        self._changed = asyncio.Event()

    def connected(self, link: Link, facts: InstanceFacts) -> None:
        assert len(self.boots) == len(self.losses), "connected twice"
        self.boots.append(facts.boot)
        self._changed.set()

    def report(self, link: Link, report: InstanceReport) -> None:
        assert len(self.boots) == len(self.losses) + 1, "told between lost and connected"
        self.reports.append(report)
        self._changed.set()

    def lost(self, link: Link, reason: str, cause: LossCause) -> None:
        assert len(self.boots) == len(self.losses) + 1
        self.losses.append(reason)
        self.causes.append(cause)
        self._changed.set()

    def message(self, link: Link, message: RequestAnswer) -> None:
        assert len(self.boots) == len(self.losses) + 1
        self.messages.append(message)
        self._changed.set()

    async def until(self, condition: Callable[[], Any]) -> Any:
        """The first true value; looks whenever something was told."""
        async with asyncio.timeout(DEADLINE):
            while not (value := condition()):
                self._changed.clear()
                await self._changed.wait()
        return value

    def outputs(self, id: str) -> list[Output]:
        return [m for m in self.messages if isinstance(m, Output) and m.id == id]

    def tokens(self, id: str) -> list[int]:
        return [token for output in self.outputs(id) for token in output.tokens]

    def finish(self, id: str) -> str | None:
        found = self.outputs(id)
        return found[-1].finish_reason if found else None

    def accepted(self, id: str) -> bool:
        return any(isinstance(m, Accepted) and m.id == id for m in self.messages)

    def rejected(self, id: str) -> Rejected | None:
        found = [m for m in self.messages if isinstance(m, Rejected) and m.id == id]
        return found[0] if found else None


def add(id: str, prompt: list[int] | None = None, **fields: Any) -> AddRequest:
    sampling = {"max_tokens": 8, **fields.pop("sampling", {})}
    return AddRequest(
        id=id,
        prompt=prompt or [10, 11, 12, 13],
        sampling=SamplingParams(**sampling),
        arrival=time.monotonic(),
        **fields,
    )


@asynccontextmanager
async def running(link: Link) -> AsyncIterator[None]:
    task = asyncio.create_task(link.run())
    try:
        yield
    finally:
        await link.close()
        async with asyncio.timeout(DEADLINE):
            await task


@asynccontextmanager
async def linked(
    url: str, events: LinkEvents | None = None, **options: Any
) -> AsyncIterator[tuple[InstanceLink, Recorder]]:
    """A link that is up."""
    recorder = events or Recorder()
    assert isinstance(recorder, Recorder)
    link = InstanceLink(url, recorder, backoff=FAST, **options)
    async with running(link):
        await recorder.until(lambda: recorder.boots and recorder.reports)
        yield link, recorder


class Process:
    """An instance as a process of its own, with an engine process below it."""

    def __init__(self, drain_seconds: float = 5.0, **env: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-m", "tests.server.serve_fake", str(drain_seconds)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ENGINE_PATH, **env},
        )
        assert self.child.stdout is not None
        port, engine = self.child.stdout.readline().split()
        self.url = f"http://127.0.0.1:{port}"
        self.pid = self.child.pid
        self.engine = int(engine)

    def close(self) -> None:
        for pid in (self.engine, self.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self.child.kill()
        self.child.wait(DEADLINE)
        assert self.child.stdout is not None
        self.child.stdout.close()
