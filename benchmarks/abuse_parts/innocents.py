"""Clients that behave, and what they see: times to first tokens, between tokens, and of /health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from abuse_parts.sockets import Address

PROMPT = "Tell me something about rivers. "
TOKENS = 24
HEALTH_SECONDS = 0.1


@dataclass
class Seen:
    """Measurements of one phase, in seconds."""

    first: list[float] = field(default_factory=list)
    """Times to first tokens."""
    gaps: list[float] = field(default_factory=list)
    """Times between tokens."""
    health: list[float] = field(default_factory=list)
    """Times of answers to /health."""
    failures: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "requests": len(self.first),
            "failures": len(self.failures),
            "reasons": sorted(set(self.failures))[:5],
            "ttft_p50": percentile(self.first, 50),
            "ttft_p90": percentile(self.first, 90),
            "itl_p50": percentile(self.gaps, 50),
            "itl_p99": percentile(self.gaps, 99),
            "health_p99": percentile(self.health, 99),
            "health_worst": max(self.health, default=None),
        }


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that so many percent do not exceed; None of no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else None


class Innocents:
    """Streams and asks for /health all the time; what is seen goes to ``seen``, which may change.

    Args:
        count: streams at once.
        pause: seconds between two requests of one client.
    """

    def __init__(self, address: Address, *, count: int, pause: float) -> None:
        self.seen = Seen()
        self._address = address
        self._count = count
        self._pause = pause
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Innocents:
        url = f"http://{self._address.host}:{self._address.port}"
        headers = {"Authorization": f"Bearer {self._address.key}"}
        self._client = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=60.0, trust_env=False
        )
        self._tasks = [asyncio.create_task(self._stream(n)) for n in range(self._count)]
        self._tasks.append(asyncio.create_task(self._watch()))
        return self

    async def __aexit__(self, *reason: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    async def _stream(self, number: int) -> None:
        turn = 0
        while True:
            turn += 1
            await asyncio.sleep(self._pause)
            try:
                await self._one(f"{PROMPT}{number}.{turn}")
            except (httpx.HTTPError, ValueError) as error:
                self.seen.failures.append(f"{type(error).__name__}: {error}"[:200])

    async def _one(self, prompt: str) -> None:
        seen, began, last = self.seen, time.monotonic(), None
        body = {"prompt": prompt, "max_tokens": TOKENS, "stream": True, "ignore_eos": True}
        ended = False
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise ValueError(f"status {answer.status_code}: {(await answer.aread())[:200]!r}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                now = time.monotonic()
                if line == "data: [DONE]":
                    ended = True
                elif '"error"' in line:
                    raise ValueError(line[:200])
                elif last is None:
                    seen.first.append(now - began)
                else:
                    seen.gaps.append(now - last)
                last = now
        if not ended:
            raise ValueError("the stream ended early")

    async def _watch(self) -> None:
        """Ask on a connection that stays, and on a new one, in turn."""
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            await self._ask(self._client)
            async with httpx.AsyncClient(
                base_url=self._client.base_url, timeout=60.0, trust_env=False
            ) as fresh:
                await self._ask(fresh)

    async def _ask(self, client: httpx.AsyncClient) -> None:
        began = time.monotonic()
        try:
            status = (await client.get("/health")).status_code
            if status != 200:
                self.seen.failures.append(f"/health: {status}")
        except httpx.HTTPError as error:
            self.seen.failures.append(f"/health: {type(error).__name__}")
        self.seen.health.append(time.monotonic() - began)
