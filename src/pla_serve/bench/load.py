"""Open-loop load generator: every request is sent at its due time, however long others take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from pla_serve.bench.client import Clock, Endpoint, RequestTarget, TimedRequest, exchange
from pla_serve.bench.text import Filler
from pla_serve.bench.tiers import draw_tier
from pla_serve.bench.transport import RequestTransport
from pla_serve.bench.workload import BenchTurn, BenchWorkload, Session
from pla_serve.policy.tiers import Tier

Sleep = Callable[[float], Awaitable[None]]
LEAD = 0.25
"""Seconds between the making of a prompt and its due time, so that making it delays no request."""


@dataclass(slots=True)
class Record:
    """A request that became due. Times are seconds from the start of the run."""

    turn: BenchTurn
    session: int
    due: float
    exchange: TimedRequest = field(default_factory=TimedRequest)
    tier: Tier | None = None

    @property
    def ok(self) -> bool:
        """Whether the whole answer came."""
        return self.exchange.error is None and self.exchange.done is not None

    @property
    def new_tokens(self) -> int:
        """Prompt tokens that were not cached, by the server's usage; as planned if it has none."""
        prompt, cached = self.exchange.prompt_tokens, self.exchange.cached_tokens
        if prompt is None or cached is None:
            return self.turn.new_tokens
        return max(prompt - cached, 1)

    @property
    def lag(self) -> float | None:
        """Seconds from the due time to the sending: how late the client itself was."""
        return None if self.exchange.sent is None else self.exchange.sent - self.due

    @property
    def ttft(self) -> float | None:
        """Seconds from the due time to the first token; the client's own lateness is included."""
        return None if self.exchange.first is None else self.exchange.first - self.due

    @property
    def latency(self) -> float | None:
        """Seconds from the due time to the end of a whole answer."""
        done = self.exchange.done
        return done - self.due if self.ok and done is not None else None


@dataclass(frozen=True, slots=True)
class RunResult:
    """Requests of one run."""

    records: list[Record]
    """Requests that became due, in the order of their due times."""
    seconds: float
    """Time from the start to the end of the last answer."""
    planned: int
    """Number of requests of the workload."""
    stopped: str | None
    """Reason why the run ended early, ``interrupted`` or ``unfinished`` (out of time), or None."""


class LoadObserver(Protocol):
    """Receives every request when it is sent and when it ends; shows progress."""

    def sent(self, record: Record) -> None: ...

    def finished(self, record: Record) -> None: ...


class NoLoadObserver:
    """Ignores everything."""

    def sent(self, record: Record) -> None:
        pass

    def finished(self, record: Record) -> None:
        pass


class Conversation:
    """Makes the prompts of one session from its turns and the real answers, as chat clients do."""

    def __init__(self, endpoint: Endpoint, filler: Filler, *, ids: bool, remembers: bool) -> None:
        self._endpoint = endpoint
        self._filler = filler
        self._ids = ids
        self._remembers = remembers
        self._messages: list[dict[str, str]] = []

    def ask(self, turn: BenchTurn) -> object:
        """Return the next prompt: messages for chat; text or token ids for completions."""
        if self._ids:
            return self._filler.ids(turn.pieces)
        if not self._remembers:
            self._messages.clear()
        self._messages.append({"role": "user", "content": self._filler.words(turn.pieces)})
        if self._endpoint == "chat":
            return self._messages
        return "\n".join(message["content"] for message in self._messages)

    def answered(self, text: str) -> None:
        """Add the answer to the prompts that follow."""
        self._messages.append({"role": "assistant", "content": text})


class LoadGenerator:
    """Sends workloads to one server.

    ``clock`` and ``sleep`` must agree with each other; tests give virtual ones.
    """

    def __init__(
        self,
        transport: RequestTransport,
        target: RequestTarget,
        filler: Filler,
        *,
        clock: Clock,
        sleep: Sleep = asyncio.sleep,
        ids: bool = False,
    ) -> None:
        self._transport = transport
        self._target = target
        self._filler = filler
        self._clock = clock
        self._sleep = sleep
        self._ids = ids
        self._observer: LoadObserver = NoLoadObserver()
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """End the run now; requests that are not answered are recorded as interrupted."""
        self._stop.set()

    async def run(
        self, workload: BenchWorkload, max_seconds: float, observer: LoadObserver | None = None
    ) -> RunResult:
        """Send the workload; return when all is answered, at ``max_seconds``, or after `stop`.

        Raises:
            ValueError: token-id prompts cannot hold the answers that a multi-turn session needs.
        """
        if self._ids and workload.multi_turn:
            raise ValueError(
                "multi-turn sessions need text prompts: their history is the answers' text"
            )
        self._observer = observer or NoLoadObserver()
        records: list[Record] = []
        start = self._clock() + LEAD
        ends = {
            asyncio.ensure_future(self._all(workload, start, records)): None,
            asyncio.ensure_future(self._stop.wait()): "interrupted",
            asyncio.ensure_future(self._sleep(max_seconds + LEAD)): "unfinished",
        }
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)
        reasons = [ends[task] for task in done]
        stopped = None if None in reasons else reasons[0]
        for task in done:
            task.result()
        return _result(records, workload.requests, self._clock() - start, stopped)

    async def _all(self, workload: BenchWorkload, start: float, records: list[Record]) -> None:
        async with asyncio.TaskGroup() as group:
            for number, session in enumerate(workload.sessions):
                await self._until(start + session.start - LEAD)
                group.create_task(self._session(number, session, start, records))

    async def _session(
        self, number: int, session: Session, start: float, records: list[Record]
    ) -> None:
        conversation = Conversation(
            self._target.endpoint, self._filler, ids=self._ids, remembers=session.remembers
        )
        tier = draw_tier(self._target.tiers, number)
        done = session.start
        for position, turn in enumerate(session.turns):
            think = turn.think if position else 0.0
            due = max(session.start + turn.offset, done + think)
            record = Record(turn, number, due, tier=tier)
            body = self._target.body(conversation.ask(turn), turn.max_tokens, tier)
            await self._until(start + record.due)
            records.append(record)
            await self._send(record, body, start)
            if not record.ok:
                return
            conversation.answered(record.exchange.text)
            done = self._clock() - start

    async def _send(self, record: Record, body: bytes, start: float) -> None:
        self._observer.sent(record)
        await exchange(
            self._transport,
            self._target.path,
            body,
            lambda: self._clock() - start,
            record.exchange,
        )
        self._observer.finished(record)

    async def _until(self, moment: float) -> None:
        wait = moment - self._clock()
        if wait > 0:
            await self._sleep(wait)


def _result(records: list[Record], planned: int, elapsed: float, stopped: str | None) -> RunResult:
    """Make the result: mark the requests that were cut short, and measure the run.

    A run lasts until its last answer, or until it was stopped.
    """
    for record in records:
        if record.exchange.done is None:
            record.exchange.error = record.exchange.error or stopped or "interrupted"
    records.sort(key=lambda record: record.due)
    ends = [record.exchange.done for record in records if record.exchange.done is not None]
    seconds = elapsed if stopped else max(ends, default=0.0)
    return RunResult(records, max(seconds, 1e-9), planned, stopped)
