"""Keeps an engine process alive and routes its messages to the requests they belong to."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import zmq

from pla_serve.server.engine.backend import EngineStartError, EngineUnavailableError
from pla_serve.server.engine.heartbeat import BEAT_SECONDS, Heartbeat
from pla_serve.server.engine.process import EngineProcess, EngineSpec
from pla_serve.server.engine.session import AnswerReceiver, EngineDiedError, EngineSession
from pla_serve.wire.engine import (
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    Inbound,
    Output,
    Ping,
    Pong,
    RequestAnswer,
)

log = logging.getLogger(__name__)


class EngineObserver(Protocol):
    """Receives the events of the engine client: the metrics, and the links to routers."""

    def ready(self, info: EngineReady) -> None: ...

    def stats(self, stats: EngineStats) -> None: ...

    def lost(self, reason: str) -> None: ...

    def alive(self) -> None:
        """The engine has answered a `ping`."""

    def restarted(self) -> None: ...


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How a dead engine is brought back.

    The n-th failure in a row waits ``base * 2**(n-2)`` seconds, at most ``most``; the first does
    not wait. The row ends once a request was served. After ``tries`` failures the client gives up.
    """

    tries: int = 8
    base_seconds: float = 1.0
    most_seconds: float = 30.0

    def delay(self, failures: int) -> float:
        if failures < 2:
            return 0.0
        return float(min(self.base_seconds * 2.0 ** (failures - 2), self.most_seconds))


class EngineClient:
    """One engine, restarted when it dies. All methods belong to one event loop.

    `run` supervises and must be running; sessions carry requests. When the process dies, every
    session with requests in flight fails with `EngineDiedError` at once.
    """

    def __init__(
        self,
        spec: EngineSpec,
        observer: EngineObserver,
        *,
        restarts: RestartPolicy | None = None,
        start: Callable[..., EngineProcess] = EngineProcess,
        max_waiting: int = 256,
        silence_seconds: float = 30.0,
        beat_seconds: float = BEAT_SECONDS,
    ) -> None:
        self._spec = spec
        self._silence_seconds = silence_seconds
        self._beat_seconds = beat_seconds
        self._heartbeat = Heartbeat(silence_seconds, beat_seconds)
        self._observers = [observer]
        self._restarts = restarts or RestartPolicy()
        self._start = start
        self._max_waiting = max_waiting
        self._waiting = 0
        self._routes: dict[str, AnswerReceiver] = {}
        self._process: EngineProcess | None = None
        self._ready = asyncio.Event()
        self._failures = 0
        self.state = EngineState.STARTING
        self.info: EngineReady | None = None
        """What the newest engine said when it became ready; kept while it restarts."""
        self.boot = ""
        """Another one for each life of the engine."""

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    @property
    def status(self) -> str:
        return self.state.value

    @property
    def pid(self) -> int | None:
        """The engine process, for people and tests that want to kill it."""
        return self._process.pid if self._process else None

    async def run(self) -> None:
        """Start the engine, and again whenever it dies, until `stop`.

        Raises:
            EngineStartError: the first start failed, or too many in a row.
        """
        while True:
            reason = await self._live()
            if self.state is EngineState.STOPPED:
                return
            never_ready = self.info is None
            self._failures += 1
            if never_ready or self._failures >= self._restarts.tries:
                self.state = EngineState.STOPPED
                raise EngineStartError(reason)
            self.state = EngineState.RESTARTING
            for observer in self._observers:
                observer.restarted()
            delay = self._restarts.delay(self._failures)
            log.error("%s; starting it again in %.0f s", reason, delay)
            await asyncio.sleep(delay)

    async def stop(self, grace_seconds: float = 5.0) -> None:
        """End the engine for good; requests in flight fail. One that still loads is killed."""
        grace_seconds = grace_seconds if self.is_ready else 0.0
        self.state = EngineState.STOPPED
        self._lose("the server is shutting down")
        if self._process is not None:
            await self._process.stop(grace_seconds)

    async def ready(self) -> EngineReady:
        """Waits for as long as it takes."""
        await self._ready.wait()
        assert self.info is not None
        return self.info

    async def wait_ready(self, seconds: float) -> EngineReady:
        """The engine's facts, once it takes requests.

        Raises:
            EngineUnavailableError: not within ``seconds``, or too many requests wait already.
        """
        if not self._ready.is_set():
            if self.state is EngineState.STOPPED or self._waiting >= self._max_waiting:
                raise EngineUnavailableError("the engine is not running", 5.0)
            self._waiting += 1
            try:
                async with asyncio.timeout(seconds):
                    await self._ready.wait()
            except TimeoutError:
                raise EngineUnavailableError(f"the engine is {self.state.value}", 5.0) from None
            finally:
                self._waiting -= 1
        assert self.info is not None
        return self.info

    def session(self, max_unread_tokens: int, tenant: str = "") -> EngineSession:
        """The engine shares its time between tenants."""
        return EngineSession(self, max_unread_tokens, tenant)

    def watch(self, observer: EngineObserver) -> None:
        """Tell it what happens from now on, as the one given at construction."""
        self._observers.append(observer)

    def ping(self) -> None:
        """Observers hear ``alive`` once the engine has got to its inbox; never from a dead one."""
        if self._process is not None:
            self._process.send(Ping())

    def open_route(self, id: str, session: AnswerReceiver) -> None:
        if not self._ready.is_set():
            raise EngineDiedError("the engine is not running")
        self._routes[id] = session

    def close_route(self, id: str) -> None:
        self._routes.pop(id, None)

    def send(self, message: Inbound) -> None:
        if self._process is not None:
            self._process.send(message)

    async def _live(self) -> str:
        """Run one process to its end; returns the reason. A failed start is an end as well."""
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        try:
            process = self._start(self._spec, deliver=self._deliver, ended=ended.set_result)
        except (
            OSError,
            RuntimeError,
            zmq.ZMQError,
        ) as error:  # no descriptors, processes, threads or memory
            return f"the engine process cannot be started: {error}"
        self._process = process
        self._heartbeat.heard()
        watch = asyncio.create_task(self._watch(process))
        try:
            reason = await ended
        except asyncio.CancelledError:
            process.kill()
            raise
        finally:
            watch.cancel()
        self._process = None
        self._lose(reason)
        return reason

    async def _watch(self, process: EngineProcess) -> None:
        """Kill an engine that was ready and hangs. One that loads may take as long as it takes."""
        while True:
            await asyncio.sleep(self._beat_seconds)
            if not self._ready.is_set():
                self._heartbeat.heard()
                continue
            if self._heartbeat.beat():
                reason = f"the engine did not answer for {self._silence_seconds:g} s and was killed"
                log.error("%s; if it does work that takes longer, raise the limit", reason)
                self.state = EngineState.RESTARTING
                self._lose(reason)
                process.kill()
                return
            process.send(Ping())

    def _deliver(self, message: FromEngine) -> None:
        self._heartbeat.heard()
        if isinstance(message, EngineStats):
            for observer in self._observers:
                observer.stats(message)
        elif isinstance(message, EngineReady):
            if self.state is EngineState.STOPPED:
                return  # it became ready on its way out
            self.info = message
            self.boot = uuid.uuid4().hex
            self.state = EngineState.READY
            self._ready.set()
            for observer in self._observers:
                observer.ready(message)
            log.info("the engine is ready")
        elif isinstance(message, Pong):
            for observer in self._observers:
                observer.alive()
        elif isinstance(message, EngineFailed):
            log.error("the engine failed: %s", message.error)
            self._lose(message.error, told="the engine failed; the server's log says why")
        else:
            if isinstance(message, Output) and message.finish_reason in ("stop", "length"):
                self._failures = 0
            session = self._routes.get(message.id)
            if session is not None:
                self._pass_on(message, session)

    def _pass_on(self, message: RequestAnswer, session: AnswerReceiver) -> None:
        """Give an answer to its session; one that cannot take it fails, and no other one."""
        try:
            session.take(message)
        except Exception as error:
            log.exception("an answer could not be taken")
            what = f"the server failed on this answer ({type(error).__name__}); its log says more"
            session.fail(EngineDiedError(what, answered=True))

    def _lose(self, reason: str, told: str | None = None) -> None:
        """Fail everything in flight; later requests wait for the next process.

        Args:
            told: what clients are told where the reason is not for them, as it may hold paths.
        """
        self._ready.clear()
        for observer in self._observers:
            observer.lost(reason)
        for session in set(self._routes.values()):
            session.fail(EngineDiedError(told or reason))
        self._routes.clear()
