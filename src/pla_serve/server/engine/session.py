"""Session of one HTTP request with the engine: it sends requests and collects their answers."""

from __future__ import annotations

import asyncio
from typing import Protocol

import msgspec

from pla_serve.wire.engine import (
    AbortRequest,
    Accepted,
    AddRequest,
    FinishReason,
    Inbound,
    Offer,
    Output,
    PromptLogprobs,
    Rejected,
    RequestAnswer,
    TokenLogprob,
)


class EngineDiedError(Exception):
    """The engine process ended with requests in flight. The message says why.

    Args:
        answered: the engine is alive, and answered this request with an error.
    """

    def __init__(self, reason: str, *, answered: bool = False) -> None:
        super().__init__(reason)
        self.answered = answered


class SlowReaderError(Exception):
    """The client left too many tokens unread; its requests were aborted."""


class Update:
    """Answers about one sequence since the last `receive`, merged into one."""

    __slots__ = (
        "cached_tokens",
        "embedding",
        "error",
        "fault",
        "finish_reason",
        "id",
        "logprobs",
        "prompt_logprobs",
        "queued",
        "rejected",
        "stop_token",
        "tokens",
    )

    def __init__(self, id: str) -> None:
        self.id = id
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: PromptLogprobs | None = None
        self.embedding: bytes | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_token: int | None = None
        self.cached_tokens: int | None = None
        self.queued: float | None = None
        self.error: str | None = None
        self.fault: str = "engine"
        self.rejected: Rejected | None = None

    def merge(self, output: Output) -> None:
        self.tokens += output.tokens
        if output.logprobs:
            self.logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.embedding is not None:
            self.embedding = output.embedding
        self.finish_reason = output.finish_reason
        self.stop_token = output.stop_token
        self.error = output.error
        self.fault = output.fault
        if output.cached_tokens is not None:
            self.cached_tokens = output.cached_tokens
        if output.queued is not None:
            self.queued = output.queued


class AnswerReceiver(Protocol):
    """Receives the answers to requests."""

    def take(self, message: RequestAnswer) -> None: ...

    def fail(self, failure: Exception) -> None:
        """No more answers come, to any of its requests."""


class MessageRoutes(Protocol):
    """Sends requests, and routes answers by id: the part of a backend that a session uses."""

    def open_route(self, id: str, session: AnswerReceiver) -> None:
        """Pass answers with this id to ``session`` from now on.

        Raises:
            EngineDiedError: there is no engine to send to.
        """

    def close_route(self, id: str) -> None: ...

    def send(self, message: Inbound) -> None: ...


class EngineSession:
    """Sends requests and collects their answers until `close`, which aborts unfinished ones.

    Answers are merged until `receive` takes them, so a reader that lags costs memory for its tokens
    only. Once a sequence has more than ``max_unread_tokens`` of them, all requests of the session
    are aborted and `receive` raises `SlowReaderError`. All methods belong to the event loop.
    """

    def __init__(self, router: MessageRoutes, max_unread_tokens: int, tenant: str = "") -> None:
        self._router = router
        self._tenant = tenant
        self._max_unread = max_unread_tokens
        self._open: set[str] = set()
        self._updates: dict[str, Update] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._due: float | None = None
        """Loop time at which the waiting `receive` gives up."""
        self._timer: asyncio.TimerHandle | None = None
        self._failure: Exception | None = None

    def submit(self, request: AddRequest) -> None:
        """Raises:
        EngineDiedError: there is no engine to send to.
        """
        self._router.open_route(request.id, self)
        self._open.add(request.id)
        if self._tenant:
            request = msgspec.structs.replace(request, tenant=self._tenant)
        self._router.send(request)

    def abort(self, id: str) -> None:
        """Stop one sequence; no further answers about it come. Unknown ids are ignored."""
        self._updates.pop(id, None)
        if id in self._open:
            self._forget(id)
            self._router.send(AbortRequest(id))

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for id in list(self._open):
            self.abort(id)

    async def receive(self, timeout: float | None = None) -> list[Update]:
        """Return answers since the last call, one item a sequence; none after ``timeout`` seconds.

        Raises:
            EngineDiedError: the process is gone, and with it everything in flight.
            SlowReaderError: the caller came back too late.
        """
        if not self._updates and self._failure is None:
            await self._wait(timeout)
        if not self._updates and self._failure is not None:
            raise self._failure
        updates, self._updates = self._updates, {}
        return list(updates.values())

    def take(self, message: RequestAnswer) -> None:
        """Take an answer about a sequence of this session."""
        if isinstance(message, Offer):
            return  # for routers, which ask for it
        update = self._updates.get(message.id)
        if update is None:
            update = self._updates[message.id] = Update(message.id)
        if isinstance(message, Output):
            update.merge(message)
            if message.finish_reason is not None:
                self._forget(message.id)
            if len(update.tokens) > self._max_unread:
                self.close()
                self._updates.clear()
                self.fail(SlowReaderError())
        elif isinstance(message, Accepted):
            update.cached_tokens = message.cached_tokens
        else:
            update.rejected = message
            self._forget(message.id)
        self._wake()

    def fail(self, failure: Exception) -> None:
        """End the session: nothing more comes, and `receive` raises after what has come."""
        for id in list(self._open):
            self._forget(id)
        self._failure = failure
        self._wake()

    async def _wait(self, timeout: float | None) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        if timeout is not None:
            self._due = loop.time() + timeout
            if self._timer is not None and self._timer.when() > self._due:
                self._timer.cancel()
                self._timer = None
            if self._timer is None:
                self._timer = loop.call_at(self._due, self._look)
        try:
            await self._waiter
        finally:
            self._waiter = self._due = None

    def _look(self) -> None:
        """End the wait that is due. One timer serves many waits; most end before it fires."""
        self._timer = None
        if self._due is None:
            return
        loop = asyncio.get_running_loop()
        if self._due <= loop.time():
            self._wake()
        else:
            self._timer = loop.call_at(self._due, self._look)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _forget(self, id: str) -> None:
        self._open.discard(id)
        self._router.close_route(id)
