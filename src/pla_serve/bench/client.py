"""One request to an OpenAI-compatible server, timed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import httpx
import msgspec

from pla_serve.bench.sse import DONE, EventSplitter, decode

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
class Exchange:
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


class Transport(Protocol):
    """Posts a body and streams what comes back. Tests put a scripted one here."""

    def post(
        self, path: str, body: bytes
    ) -> AbstractAsyncContextManager[tuple[int, AsyncIterator[bytes]]]:
        """Status and the body in portions; raises OSError or httpx.TransportError."""
        ...


class HttpTransport:
    """Connections are opened as needed, without a limit: a free slot is never waited for."""

    def __init__(self, base_url: str, api_key: str | None = None, timeout: float = 600.0) -> None:
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._client = httpx.AsyncClient(
            base_url=base_url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=httpx.Timeout(timeout, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        async with self._client.stream("POST", path, content=body) as response:
            yield response.status_code, response.aiter_raw()

    async def get(self, path: str) -> Any:
        """JSON. Raises httpx.HTTPError."""
        response = await self._client.get(path)
        return response.raise_for_status().json()

    async def close(self) -> None:
        await self._client.aclose()


async def exchange(
    transport: Transport, path: str, body: bytes, clock: Clock, into: Exchange
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
    except (TimeoutError, httpx.TimeoutException) as error:
        into.error, into.detail = "timeout", str(error)
    except (OSError, httpx.HTTPError) as error:
        into.error, into.detail = "connection", f"{type(error).__name__}: {error}"
    except msgspec.MsgspecError as error:
        into.error, into.detail = "malformed", str(error)
    into.done = clock()


async def _read(portions: AsyncIterator[bytes], clock: Clock, into: Exchange) -> None:
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


def _take(payload: bytes, now: float, into: Exchange, texts: list[str]) -> None:
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


async def one(transport: Transport, target: Target, prompt: object, max_tokens: int) -> Exchange:
    """One request on its own, on the event loop's clock.

    Raises:
        RuntimeError: it failed; the message says how.
    """
    result = Exchange()
    body = target.body(prompt, max_tokens)
    await exchange(transport, target.path, body, asyncio.get_running_loop().time, result)
    if result.error is not None:
        raise RuntimeError(f"the server failed a request ({result.error}): {result.detail}")
    return result
