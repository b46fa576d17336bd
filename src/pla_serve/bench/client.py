"""A timed request to a server that speaks the OpenAI API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from pla_serve.bench.sse import DONE, EventSplitter, decode
from pla_serve.bench.transport import RequestTransport
from pla_serve.policy.tiers import Tier, TierShare

Endpoint = Literal["chat", "completions"]
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class RequestTarget:
    """Model and endpoint of requests, and what all of them have in common."""

    model: str
    endpoint: Endpoint = "chat"
    ignore_eos: bool = True
    """Whether answers are exactly as long as planned, so that every policy gets the same work.
    vLLM, SGLang and this server support it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request body."""
    tiers: tuple[TierShare, ...] = ()
    """Tiers of sessions, and how many are of each."""

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def body(self, prompt: object, max_tokens: int, tier: Tier | None = None) -> bytes:
        """Make a request body. ``prompt`` holds messages for chat, text or token ids otherwise."""
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
        if tier is not None:
            fields["service_tier"] = tier.name
        return msgspec.json.encode(fields | self.extra)


@dataclass(slots=True)
class TimedRequest:
    """Times and outcome of one request, filled while it runs. Times are on the caller's clock."""

    sent: float | None = None
    first: float | None = None
    """Time of the first event with text; of an answer without any text, of the event that ended it.
    """
    last: float | None = None
    """Time of the last event with text."""
    done: float | None = None
    gaps: list[float] = field(default_factory=list)
    """Seconds between tokens after the first event that carried text; see `per_token`."""
    pause: float | None = None
    """Longest time between two events with text; None of an answer with less than two. Unlike
    ``gaps`` it does not share out the time before an event that carries several tokens."""
    text: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    """Kind of failure, or None if the answer is whole: ``http 429``, ``connection``, ``timeout``,
    ``server error``, ``cut off``, ``malformed``, ``unfinished``, ``interrupted``."""
    detail: str = ""


async def exchange(
    transport: RequestTransport, path: str, body: bytes, clock: Clock, into: TimedRequest
) -> None:
    """Send a body and read the streamed answer to its end. Failures are recorded, not raised."""
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


@dataclass(slots=True)
class _Texts:
    """Text of an answer as it came: an entry for each event that carried some."""

    texts: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    """Seconds before each of them but the first."""


async def _read(portions: AsyncIterator[bytes], clock: Clock, into: TimedRequest) -> None:
    splitter = EventSplitter()
    came = _Texts()
    complete = False
    try:
        async for portion in portions:
            now = clock()
            for payload in splitter.feed(portion):
                if payload == DONE:
                    complete = True
                else:
                    _take(payload, now, into, came)
    finally:  # of an answer that is cut off, what came of it
        into.text = "".join(came.texts)
        into.pause = max(came.gaps, default=None)
        into.gaps = per_token(came.gaps, [len(text) for text in came.texts], into.output_tokens)
    if into.error is None and not (complete or into.finish_reason):
        into.error = "cut off"
    elif into.error is None and into.first is None:
        into.error, into.detail = "malformed", "the answer has neither text nor an end"


def _take(payload: bytes, now: float, into: TimedRequest, came: _Texts) -> None:
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
            came.texts.append(content)
            if into.last is not None:
                came.gaps.append(now - into.last)
            into.last = now
        if into.first is None and (content or choice.finish_reason):
            into.first = now


def per_token(gaps: Sequence[float], sizes: Sequence[int], tokens: int | None) -> list[float]:
    """Seconds between tokens, from the seconds between events that carry one or more.

    Events do not say how many tokens they carry. If the answer has more tokens than events, each
    event has one, and the others are shared out by the length of the texts. The gap before an event
    of k tokens counts as k gaps of its k-th part.

    >>> per_token([0.1, 0.3], [4, 4, 40], 5)
    [0.1, 0.1, 0.1, 0.1]

    Args:
        gaps: seconds before each event but the first.
        sizes: characters of each event.
        tokens: tokens of the answer by the server's usage; None if it does not say.
    """
    more = 0 if tokens is None else tokens - len(sizes)
    if more <= 0 or not gaps:
        return list(gaps)
    whole = sum(sizes)
    counts = [1 + more * size // whole for size in sizes]
    rests = sorted(range(len(sizes)), key=lambda i: (-(more * sizes[i] % whole), i))
    for i in rests[: more + len(sizes) - sum(counts)]:
        counts[i] += 1
    return [gap / k for gap, k in zip(gaps, counts[1:], strict=True) for _ in range(k)]


async def one(
    transport: RequestTransport, target: RequestTarget, prompt: object, max_tokens: int
) -> TimedRequest:
    """Send one request and return its times, on the clock of the event loop.

    Raises:
        RuntimeError: the request failed; the message says how.
    """
    result = TimedRequest()
    body = target.body(prompt, max_tokens)
    await exchange(transport, target.path, body, asyncio.get_running_loop().time, result)
    if result.error is not None:
        raise RuntimeError(f"the server failed a request ({result.error}): {result.detail}")
    return result
