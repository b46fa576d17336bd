"""Keeps one process of a fleet running."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import httpx

from pla_serve.fleet.supervisor.process import Child
from pla_serve.fleet.supervisor.restarts import HangDetector, Restarts
from pla_serve.fleet.supervisor.spec import Health
from pla_serve.server.link_key import LINK_KEY_VARIABLE

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
"""Longest time of one answer of a process."""
LAST_SECONDS = 5.0
"""Time that a process may take to end after its drain."""


class FleetStartError(Exception):
    """Raised if a process ended before it was ready for the first time; the message names it."""


class MemberState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    """The process ended and will be started again."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Description of a process, by which it is started as often as needed."""

    name: str
    command: Sequence[str]
    url: str
    """Base URL at which the process answers ``/ready``."""
    has_engine: bool = False
    """Whether ``/fleet/instance`` says for how long the engine of the process has been silent."""
    env: dict[str, str] = field(default_factory=dict)
    fds: tuple[int, ...] = ()
    """File descriptors that the process inherits."""


class FleetMember:
    """A process that is started again whenever it ends. All methods belong to one event loop.

    Args:
        recipe: describes the process.
        health: says when it hangs, and when it is started again.
        on_line: called with the name of the process and a line of its log.
        clock, sleep: monotonic seconds, and a function that waits for some seconds.
    """

    def __init__(
        self,
        recipe: Recipe,
        health: Health,
        on_line: Callable[[str, str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.recipe = recipe
        self.state = MemberState.STARTING
        self.ready = asyncio.Event()
        self._health = health
        self._on_line = on_line
        self._clock = clock
        self._sleep = sleep
        self._restarts = Restarts(health)
        self._child: Child | None = None
        self._worked = False
        self._renewing = False
        self._leaving = False
        """The process drains: it answers nobody, and connections wait for the next process."""
        self._end_asked = asyncio.Event()
        key = recipe.env.get(LINK_KEY_VARIABLE)
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    @property
    def pid(self) -> int | None:
        """Id of the process, or None while it does not run."""
        return self._child.pid if self._child else None

    @property
    def restarts(self) -> int:
        """Number of times that the process was started again."""
        return self._restarts.count

    async def run(self) -> None:
        """Start the process, and start it again whenever it ends, until `stop`.

        Raises:
            FleetStartError: the process ended with an error before it was ready for the first time.
            OSError: the program cannot be started.
        """
        name = self.recipe.name
        while not self._stopped():
            status = await self._live()
            if self._stopped():
                return
            if status > 0 and not self._worked:
                raise FleetStartError(
                    f"{name} ended with status {status} before it was ready; its log says why"
                )
            due = self._restarts.ended(self._clock())
            if self._renewing:
                self._renewing, due = False, self._clock()
            else:
                wait = max(0.0, due - self._clock())
                log.error("%s %s; starting it again in %.1f s", name, _describe(status), wait)
            self.state = MemberState.WAITING
            await self._pause(max(0.0, due - self._clock()))

    async def stop(self, drain_seconds: float) -> None:
        """Let the process drain and end; kill it if it takes longer."""
        self._stop()
        await self._end(drain_seconds)

    async def renew(self, drain_seconds: float) -> None:
        """Let the process drain, start it again, and return when it is ready."""
        if self._child is None:
            await self.ready.wait()
            return
        self._renewing = True
        self.ready.clear()
        await self._end(drain_seconds)
        await self.ready.wait()

    def kill(self) -> None:
        """End the process at once and do not start it again."""
        self._stop()
        if self._child is not None:
            self._child.kill()

    def _stop(self) -> None:
        self.state = MemberState.STOPPED
        self._end_asked.set()

    def _stopped(self) -> bool:
        return self.state is MemberState.STOPPED

    async def _pause(self, seconds: float) -> None:
        """Wait some seconds, or until the member is stopped."""
        tasks = {
            asyncio.ensure_future(self._sleep(seconds)),
            asyncio.ensure_future(self._end_asked.wait()),
        }
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    async def _end(self, drain_seconds: float) -> None:
        child = self._child
        if child is None:
            return
        self._leaving = True
        child.ask()
        try:
            async with asyncio.timeout(drain_seconds + LAST_SECONDS):
                await child.wait()
        except TimeoutError:
            log.warning("%s did not leave in time and is killed", self.recipe.name)
            child.kill()
            await child.wait()

    async def _live(self) -> int:
        """Start the process, wait for its end, and return its exit status."""
        name = self.recipe.name
        recipe = self.recipe
        child = await Child.start(
            recipe.command, recipe.env, lambda line: self._on_line(name, line), recipe.fds
        )
        self._child = child
        self._leaving = False
        self._restarts.started(self._clock())
        if self._stopped():  # meanwhile
            child.kill()
        else:
            self.state = MemberState.STARTING
            log.info("%s started, process %d", name, child.pid)
        watch = asyncio.create_task(self._watch(child))
        try:
            return await child.wait()
        except asyncio.CancelledError:
            child.kill()
            raise
        finally:
            watch.cancel()
            child.kill()  # its own children, for example an engine that outlived its server
            self._child = None
            self.ready.clear()

    async def _watch(self, child: Child) -> None:
        """Ask the process whether it is ready, again and again, and kill it when it hangs."""
        silence = HangDetector(self._health, self._clock())
        patience = min(ANSWER_SECONDS, self._health.hang_seconds)
        async with httpx.AsyncClient(trust_env=False, timeout=patience) as client:
            while True:
                await self._sleep(self._health.check_seconds)
                try:
                    answer = await client.get(self.recipe.url + "/ready")
                    silence.answered(self._clock() - await self._engine_silence(client))
                except httpx.HTTPError:
                    answer = None
                if silence.hangs(self._clock()) and not self._leaving:
                    log.error("%s does not answer any more and is killed", self.recipe.name)
                    child.kill()
                    return
                if answer is not None and answer.status_code == 200 and not self._stopped():
                    self._is_ready()
                elif answer is not None:
                    self.ready.clear()

    async def _engine_silence(self, client: httpx.AsyncClient) -> float:
        """Return for how many seconds the engine has been silent although it has work.

        Raises:
            httpx.HTTPError: the process does not answer, or not as an instance does.
        """
        if not self.recipe.has_engine:
            return 0.0
        answer = await client.get(self.recipe.url + "/fleet/instance", headers=self._headers)
        if answer.status_code != 200:
            return 0.0
        try:
            return float(answer.json()["engine_silent_seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise httpx.DecodingError(f"/fleet/instance says {answer.text[:80]!r}") from error

    def _is_ready(self) -> None:
        if not self.ready.is_set():
            log.info("%s is ready", self.recipe.name)
        self._worked = True
        self.state = MemberState.READY
        self.ready.set()


def _describe(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
