"""Writes one answer of the Responses API: the object, and the events of a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, Literal

import msgspec

from pla_serve.server.api.answer import KEEP_ALIVE
from pla_serve.server.api.choice_reading import ChoiceReading, Reading
from pla_serve.server.api.formats import Json
from pla_serve.server.api.generations import ChatRun
from pla_serve.server.api.logprobs import TokenNames, chat_logprobs
from pla_serve.server.api.responses.output import OutputEvent, OutputWriter
from pla_serve.server.api.responses.schema import ResponsesRequest
from pla_serve.server.api.responses.tools import SearchTool, namespaces
from pla_serve.server.errors import ApiError
from pla_serve.server.generation.generation import ChoiceDelta, Generation
from pla_serve.server.reasoning.reader import TextReader

ResponseState = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
REPEATED = (
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "previous_response_id",
    "background",
)
"""Fields of a request that the answer repeats as they are."""
REPEATED_IF_GIVEN = ("prompt_cache_key", "safety_identifier", "user")
ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}
"""By status; all others are ``server_error``."""
LARGE = 2_000
"""Log probabilities above which an object is encoded in a thread."""
LARGE_BODY = 64 * 2**10
"""Bytes of a request above which what repeats it is encoded in a thread."""


class ResponseFrame:
    """Fields of an answer that stay the same from its beginning to its end.

    Args:
        id: of the answer.
        model: its name.
        body: the request.
        run: the request as it is generated.
        stored: whether the answer will be kept.
        large: the request is large, so that what repeats it is encoded in a thread.
    """

    def __init__(
        self,
        id: str,
        model: str,
        body: ResponsesRequest,
        run: ChatRun,
        *,
        stored: bool,
        large: bool,
    ) -> None:
        self.id = id
        self.large = large
        self.namespaces = namespaces(body.tools)
        sampling = run.plan.sampling[0]
        self._fields: Json = {
            "id": id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **{name: getattr(body, name) for name in REPEATED},
            **body.model_dump(include=set(REPEATED_IF_GIVEN), exclude_none=True),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "tools": [t.shown() for t in body.tools if not isinstance(t, SearchTool)],
            "tool_choice": _shown_choice(body.tool_choice),
            "text": {"format": body.text.format.shown(), "verbosity": "medium"},
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "top_logprobs": body.top_logprobs or 0,
            "truncation": "disabled",
            "metadata": body.metadata or {},
            "service_tier": run.plan.tier_name,
            "store": stored,
        }

    def snapshot(self, status: ResponseState, output: Iterable[Json] = (), **more: Any) -> Json:
        """Return the answer as it is now."""
        fields = {"error": None, "incomplete_details": None, "completed_at": None}
        return {**self._fields, **fields, "status": status, "output": list(output), **more}

    def failed(self, error: ApiError, output: Iterable[Json] = ()) -> Json:
        """Return the answer that ``error`` has ended."""
        code = ERROR_CODES.get(error.status, "server_error")
        return self.snapshot("failed", output, error={"code": code, "message": error.message})


Settle = Callable[[Json], Awaitable[bytes]]
"""Takes an answer that is over, keeps it, and returns its JSON."""


class ResponseRun:
    """Runs one generation, and makes output items of it.

    Args:
        frame: of the answer.
        run: the request.
        generation: admitted by the engine.
        names: of tokens, for log probabilities; None: nobody asked for them.

    Attributes:
        output: what there is so far.
    """

    def __init__(
        self, frame: ResponseFrame, run: ChatRun, generation: Generation, names: TokenNames | None
    ) -> None:
        self.frame = frame
        self.output = OutputWriter(frame.namespaces)
        self._reading = ChoiceReading(run.reading or Reading(TextReader))
        self.logprobs = 0
        """How many log probabilities the answer has."""
        self.cut = False
        """The answer ended because it ran out of tokens."""
        self._generation = generation
        self._names = names

    async def events(self, silence: float | None = None) -> AsyncGenerator[list[OutputEvent], None]:
        """Yield the events of all items as they come; none after ``silence`` seconds.

        Raises:
            ApiError: the generation failed.
        """
        finish = None
        async with aclosing(self._generation.deltas(silence)) as answer:
            async for deltas in answer:
                events: list[OutputEvent] = []
                for delta in deltas:
                    events += self._push(delta)
                    finish = delta.finish_reason
                yield events
        self.cut = finish == "length"
        yield list(self.output.finish("incomplete" if self.cut else "completed"))

    def whole(self) -> Json:
        """Return the answer, once `events` has ended."""
        details = {"reason": "max_output_tokens"} if self.cut else None
        return self.frame.snapshot(
            "incomplete" if self.cut else "completed",
            self.output.items,
            incomplete_details=details,
            completed_at=None if self.cut else int(time.time()),
            usage=self._usage(),
        )

    def _push(self, delta: ChoiceDelta) -> Iterable[OutputEvent]:
        logprobs: list[Json] = []
        if self._names is not None:
            logprobs = chat_logprobs(delta.tokens, delta.logprobs, self._names)
            self.logprobs += sum(1 + len(entry["top_logprobs"]) for entry in logprobs)
        last = delta.finish_reason is not None
        found = self._reading.push(delta.text, delta.tokens, last=last)
        return self.output.push(found, logprobs)

    def _usage(self) -> Json:
        used = self._generation.usage()
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": used["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._reading.reasoning_tokens},
            "total_tokens": used["total_tokens"],
        }


async def encoded(content: Json | Callable[[], Any], *, large: bool) -> bytes:
    """Return ``content`` as JSON; made and encoded in a thread if it is large."""

    def work() -> bytes:
        return msgspec.json.encode(content() if callable(content) else content)

    return await asyncio.to_thread(work) if large else work()


class ResponseStream:
    """Numbers the events of one answer, and writes them.

    Args:
        run: the answer.
        settle: takes the finished answer and returns its JSON, once it is kept.
    """

    def __init__(self, run: ResponseRun, *, settle: Settle) -> None:
        self._run = run
        self._settle = settle
        self._number = 0

    async def events(
        self, keep_alive: float, clock: Callable[[], float] = time.monotonic
    ) -> AsyncGenerator[bytes, None]:
        """Yield the bytes to send; a comment after ``keep_alive`` seconds without any.

        A failure ends the stream with ``response.failed``.
        """
        run, frame = self._run, self._run.frame
        begun = msgspec.Raw(await encoded(frame.snapshot("in_progress"), large=frame.large))
        yield self._write("response.created", response=begun)
        yield self._write("response.in_progress", response=begun)
        sent = clock()
        try:
            async with aclosing(run.events(keep_alive)) as answer:
                async for events in answer:
                    block = await self._block(events)
                    if not block and clock() - sent >= keep_alive:
                        block = KEEP_ALIVE
                    if block:
                        sent = clock()
                        yield block
            final = run.whole()
        except ApiError as error:
            yield self._join(run.output.abandon())
            final = frame.failed(error, run.output.items)
        body = await self._settle(final)
        yield self._write(f"response.{final['status']}", response=msgspec.Raw(body))

    async def _block(self, events: list[OutputEvent]) -> bytes:
        if self._run.logprobs > LARGE and any(kind.endswith(".done") for kind, _ in events):
            return await asyncio.to_thread(self._join, events)
        return self._join(events)

    def _join(self, events: Iterable[OutputEvent]) -> bytes:
        return b"".join(self._write(kind, **fields) for kind, fields in events)

    def _write(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        content = {"type": kind, "sequence_number": number, **fields}
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(content))


def _shown_choice(choice: Any) -> Any:
    if isinstance(choice, dict):
        return {"type": "function", "name": choice["function"]["name"]}
    return choice or "auto"
