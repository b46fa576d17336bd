"""One request to an OpenAI-compatible server, timed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from pla_serve.bench.sse import DONE, EventSplitter, decode
from pla_serve.bench.transport import RequestTransport

Endpoint = Literal["chat", "completions"]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of which server."""

    model: str
    endpoint: Endpoint = "chat"
    ignore_eos: bool = True
    """Answers are as long as planned, so that every policy gets the same work. vLLM, SGLang and
    this server take it; turn it off for servers that do not."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of every body."""

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def body(self, prompt: object, max_tokens: int) -> bytes:
        """``prompt``: messages for chat; text or token ids for completions."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages" if self.endpoint == "chat" else "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields | self.extra)


@dataclass(slots=True)
class TimedRequest:
    """What happened to one request; filled while it happens, times on the caller's clock."""

    sent: float | None = None
    first: float | None = None
    """First event that carried text; for an answer without any text, the event that ended it."""
    last: float | None = None
    """Last event that carried text."""
    done: float | None = None
    gaps: list[float] = field(default_factory=list)
    """Seconds between events that carried text."""
    text: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    """Kind of failure, None if the answer is whole: ``http 429``, ``connection``, ``timeout``,
    ``server error``, ``cut off``, ``malformed``, ``unfinished``, ``interrupted``."""
    detail: str = ""


async def exchange(
    transport: RequestTransport, path: str, body: bytes, clock: Clock, into: TimedRequest
) -> None:
    """Sends a body and reads the streamed answer to its end. Failures are recorded, not raised."""
    into.sent = clock()
    try:
        async with transport.post(path, body) as (status, portions):
            if status == 200:
                await _read(portions, clock, into)
            else:
                into.error = f"http {status}"
                into.detail = b"".join([part async for part in portions])[:300].decode(
                    errors="replace"
                )
    except TimeoutError as error:
        into.error, into.detail = "timeout", str(error)
    except OSError as error:
        into.error, into.detail = "connection", f"{type(error).__name__}: {error}"
    except msgspec.MsgspecError as error:
        into.error, into.detail = "malformed", str(error)
    into.done = clock()


async def _read(portions: AsyncIterator[bytes], clock: Clock, into: TimedRequest) -> None:
    splitter = EventSplitter()
    texts: list[str] = []
    complete = False
    async for portion in portions:
        now = clock()
        for payload in splitter.feed(portion):
            if payload == DONE:
                complete = True
            else:
                _take(payload, now, into, texts)
    into.text = "".join(texts)
    if into.error is None and not (complete or into.finish_reason):
        into.error = "cut off"
    elif into.error is None and into.first is None:
        into.error, into.detail = "malformed", "the answer has neither text nor an end"


def _take(payload: bytes, now: float, into: TimedRequest, texts: list[str]) -> None:
    event = decode(payload)
    if event.error is not None:
        into.error, into.detail = "server error", str(event.error)[:300]
    if event.usage is not None:
        into.prompt_tokens = event.usage.prompt_tokens
        into.output_tokens = event.usage.completion_tokens
        into.cached_tokens = event.usage.cached_tokens
    for choice in event.choices:
        content = choice.content
        into.finish_reason = choice.finish_reason or into.finish_reason
        if content:
            texts.append(content)
            if into.last is not None:
                into.gaps.append(now - into.last)
            into.last = now
        if into.first is None and (content or choice.finish_reason):
            into.first = now


async def one(
    transport: RequestTransport, target: Target, prompt: object, max_tokens: int
) -> TimedRequest:
    """One request on its own, on the event loop's clock.

    Raises:
        RuntimeError: it failed; the message says how.
    """
    result = TimedRequest()
    body = target.body(prompt, max_tokens)
    await exchange(transport, target.path, body, asyncio.get_running_loop().time, result)
    if result.error is not None:
        raise RuntimeError(f"the server failed a request ({result.error}): {result.detail}")
    return result
