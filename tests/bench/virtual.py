"""Virtual time for asyncio, and servers that follow a script."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing ever waits: when all tasks sleep, the clock jumps to the first that wakes."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "all tasks wait for something that never comes"
        self._loop.now += max(timeout, 0.0)
        return super().select(0)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Runs to the end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


@dataclass(slots=True)
class Script:
    """What a server does with one request."""

    ttft: float = 0.1
    gap: float = 0.01
    tokens: int | None = None
    """None: as many as were asked for."""
    status: int = 200
    cached: int | None = 0
    usage: bool = True
    stalls: bool = False
    """Never answers."""
    error_after: int | None = None
    cut_after: int | None = None


@dataclass(slots=True)
class Seen:
    """A request as the server got it."""

    at: float
    path: str
    body: dict[str, Any]
    answer: str = ""


@dataclass(slots=True)
class ScriptedServer:
    """A `Transport` that answers after scripted delays, on the running loop's clock."""

    script: Callable[[dict[str, Any]], Script] = lambda body: Script()
    seen: list[Seen] = field(default_factory=list)

    @asynccontextmanager
    async def post(self, path: str, body: bytes) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        request = Seen(asyncio.get_running_loop().time(), path, msgspec.json.decode(body))
        self.seen.append(request)
        script = self.script(request.body)
        if script.stalls:
            await asyncio.Event().wait()
        yield script.status, self._stream(request, script)

    async def _stream(self, request: Seen, script: Script) -> AsyncIterator[bytes]:
        if script.status != 200:
            yield b'{"error": {"message": "no"}}'
            return
        chat = request.path.endswith("chat/completions")
        count = request.body["max_tokens"] if script.tokens is None else script.tokens
        for index in range(count):
            await asyncio.sleep(script.gap if index else script.ttft)
            if index == script.cut_after:
                return
            if index == script.error_after:
                yield event({"error": {"message": "engine died"}})
                yield b"data: [DONE]\n\n"
                return
            word = f"w{index} "
            request.answer += word
            choice = {"delta": {"content": word}} if chat else {"text": word}
            last = {"finish_reason": "length"} if index == count - 1 else {}
            yield event({"choices": [{"index": 0} | choice | last]})
        if script.usage:
            yield event({"choices": [], "usage": usage(request.body, count, script.cached)})
        yield b"data: [DONE]\n\n"


def event(payload: object) -> bytes:
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


def usage(body: dict[str, Any], output: int, cached: int | None) -> dict[str, Any]:
    """Words are tokens here."""
    if "messages" in body:
        prompt = sum(len(message["content"].split()) for message in body["messages"])
    elif isinstance(body["prompt"], str):
        prompt = len(body["prompt"].split())
    else:
        prompt = len(body["prompt"])
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": output} | details
