"""Keeps a request going when the replica that answers it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec

from pla_serve.fleet.router.routed_request import RoutedRequest
from pla_serve.plugins.ray.calls import ReplicaCall, read_answers
from pla_serve.server.engine.session import EngineDiedError
from pla_serve.wire.engine import Accepted, Output, Rejected, RequestAnswer

log = logging.getLogger(__name__)

LOG = "the log of the API's replica has them"
FIRST_PAUSE, MOST_PAUSE = 0.05, 1.0
"""Seconds before a request is tried again that has failed twice without a token, and the most."""


class AnswerStream(Protocol):
    """Answers of one replica to one call, as Ray's ``DeploymentResponseGenerator``."""

    async def __anext__(self) -> bytes: ...

    def cancel(self) -> None: ...


SendCall = Callable[[ReplicaCall], AnswerStream]
"""Sends a call to the replica that the request router chooses."""


@dataclass(frozen=True, slots=True)
class ContinuationOptions:
    """How long a request waits for replicas, and how often it may fail."""

    patience_seconds: float = 60.0
    """A request waits this long for a replica that takes it."""
    liveness_seconds: float = 10.0
    """A request waits this long for a sign of life of the replica that has it."""
    most_failures: int = 4
    """Replicas that may fail it without a token in between before its client is told."""


class ContinuedStream:
    """One request until its last token, over as many replicas as that takes.

    What the client has got is kept. When a replica fails, prompt and tokens so far go to another
    one, and the stream goes on there, token for token if it is greedy or has a seed.

    Args:
        request: its receiver is told of every answer and of the end.
        send: sends a call to a replica.
        clock: the one of the request's arrival.
    """

    def __init__(
        self,
        request: RoutedRequest,
        send: SendCall,
        options: ContinuationOptions | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request = request
        self._send = send
        self._options = options or ContinuationOptions()
        self._clock = clock
        self._failed: set[str] = set()
        """Replicas that failed it since its last token."""

    async def run(self) -> None:
        """Answer the request. Cancelling this ends it at its replica too."""
        try:
            while not await self._attempt():
                if self._request.fruitless >= self._options.most_failures:
                    self._fail(f"given up after {len(self._request.failures)} failures; {LOG}")
                    return
                if self._request.fruitless > 1:
                    pause = FIRST_PAUSE * 2.0 ** (self._request.fruitless - 2)
                    await asyncio.sleep(min(pause, MOST_PAUSE))
        except Exception as error:
            log.exception("request %s failed in the API itself", self._request.id)
            self._fail(f"the API failed on it ({type(error).__name__}); {LOG}")

    async def _attempt(self) -> bool:
        """Send the request to one replica; return whether it has ended."""
        request = self._request
        request.extend_chain()
        call = ReplicaCall(
            request.message(request.next_id()),
            request.chain,
            self._clock,
            frozenset(self._failed | request.refused.keys()),
        )
        try:
            stream = self._send(call)
        except Exception as error:  # Ray's errors have no common base for callers
            return self._failure(call, f"cannot be sent: {error}")
        seconds, first = self._options.patience_seconds, True
        try:
            while True:
                async with asyncio.timeout(seconds):
                    packed = await stream.__anext__()
                seconds = self._options.liveness_seconds
                for message in read_answers(packed):
                    if isinstance(message, Output) and first:
                        first = False
                        call.on_first(message.cached_tokens)
                    if (ended := self._take(call, message)) is not None:
                        return ended
        except StopAsyncIteration:
            return self._failure(call, "its stream ended before its last token")
        except TimeoutError:
            if not call.replica:
                self._fail("no replica is ready")
                return True
            return self._failure(call, f"it was silent for {seconds:g} s")
        except Exception as error:
            return self._failure(
                call, str(error).strip().partition("\n")[0] or type(error).__name__
            )
        finally:
            with suppress(Exception):
                stream.cancel()

    def _take(self, call: ReplicaCall, message: RequestAnswer) -> bool | None:
        """Take an answer; return whether the request has ended, and None if the attempt goes on."""
        request = self._request
        if isinstance(message, Accepted):
            if not request.accepted:
                request.accepted = True
                request.receiver.take(Accepted(request.id, message.cached_tokens))
            return None
        if isinstance(message, Rejected):
            return self._rejected(call, message)
        if not isinstance(message, Output):
            return None
        failed = message.finish_reason in ("error", "abort")
        if failed and not (message.error and message.fault == "request"):
            if message.tokens:
                self._deliver(msgspec.structs.replace(message, finish_reason=None, error=None))
            return self._failure(call, message.error or "it gave no reason")
        self._deliver(message)
        return True if message.finish_reason is not None else None

    def _deliver(self, output: Output) -> None:
        request = self._request
        answer = request.answer(output)
        request.accepted = True
        if output.tokens:
            request.tokens += output.tokens
            request.fruitless = 0
            request.refused.clear()
            self._failed.clear()
        request.receiver.take(answer)

    def _rejected(self, call: ReplicaCall, message: Rejected) -> bool:
        """Try the other replicas; tell the client if all of them refuse."""
        request = self._request
        all_alike = message.retry_after is None
        if message.retry_after is not None:
            again = call.replica in request.refused
            request.refused[call.replica] = message.retry_after
            if not again and len(request.refused) < call.replicas:
                return False
        if request.accepted and not all_alike:
            request.refused.clear()
            return self._failure(call, message.reason)
        if request.accepted:
            self._fail(message.reason)
        else:
            request.receiver.take(msgspec.structs.replace(message, id=request.id))
        return True

    def _failure(self, call: ReplicaCall, reason: str) -> bool:
        """Note that a replica failed the request, which goes on."""
        request, where = self._request, call.replica or "no replica"
        log.warning("request %s: %s failed it: %s", request.id, where, reason)
        request.failures.append(f"{where} failed it: {reason}")
        request.fruitless += 1
        if call.replica:
            self._failed.add(call.replica)
        return False

    def _fail(self, reason: str) -> None:
        log.error("request %s: %s", self._request.id, "; ".join([reason, *self._request.failures]))
        self._request.receiver.fail(EngineDiedError(reason))
