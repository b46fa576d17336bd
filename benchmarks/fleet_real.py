"""A real fleet of small random models for benchmarks, and an open loop of prompts through it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fleet.chaos.tiny_fleet import VOCABULARY, TinyFleet, start_fleet, write_model

BOUNDARY = 256
SIZE = {
    "vocab_size": 30_000,  # `pla-serve calibrate` draws its prompts from so many
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
"""Of the model: small, but prefills take longer than what surrounds them."""
LARGER = {"hidden_size": 512, "intermediate_size": 1536}
"""Of it, where a short prompt has to cost several times what router and client add to it."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt of its own, with an answer of one token."""

    due: float
    """Seconds after the start."""
    tokens: int

    @property
    def short(self) -> bool:
        return self.tokens <= BOUNDARY


@contextmanager
def real_fleet(
    pools: Sequence[str],
    count: int,
    folder: Path,
    *words: str,
    model: Mapping[str, int] | None = None,
) -> Iterator[TinyFleet]:
    """Instances with one thread each and a fixed boundary; ``model`` changes its `SIZE`."""
    weights = write_model(folder / "model", **{**SIZE, **(model or {})})
    flags = ("--kv-cache-gib", "0.3", "--boundary-tokens", str(BOUNDARY))
    with start_fleet(weights, pools, folder / "fleet.log", *flags, *words, count=count) as fleet:
        yield fleet


def poisson(
    seed: object, start: float, end: float, rates: Sequence[tuple[float, int, int]]
) -> list[Ask]:
    """Prompts of several kinds: requests a second, least and most tokens of each."""
    random = Random(f"arrivals/{seed}")
    found: list[Ask] = []
    for rate, least, most in rates:
        now = start
        while rate > 0:
            now += random.expovariate(rate)
            if now >= end:
                break
            found.append(Ask(now, random.randint(least, most)))
    return sorted(found, key=lambda ask: ask.due)


async def play(
    url: str, asks: Sequence[Ask], seed: object, api_key: str | None = None
) -> list[float]:
    """Seconds from when each was due to its first token, in order. Prompts follow from ``seed``:
    the same one twice would find them cached.

    Raises:
        RuntimeError: one was not answered.
    """
    random = Random(f"prompts/{seed}")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(
        base_url=url, timeout=120, trust_env=False, limits=limits
    ) as client:
        began = time.monotonic()
        headers = {"content-type": "application/json", "authorization": f"Bearer {api_key}"}

        async def one(ask: Ask, body: bytes) -> float:
            await asyncio.sleep(began + ask.due - time.monotonic())
            async with client.stream(
                "POST", "/v1/completions", content=body, headers=headers
            ) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        if "error" in json.loads(line[6:]):
                            raise RuntimeError(line)
                        return time.monotonic() - began - ask.due
            raise RuntimeError(f"{response.status_code}: no first token")

        return list(await asyncio.gather(*(one(ask, _body(ask, random)) for ask in asks)))


def _body(ask: Ask, random: Random) -> bytes:
    prompt = [random.randrange(1, VOCABULARY) for _ in range(ask.tokens)]
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True, "stream": True}
    return json.dumps(body).encode()


async def alone(url: str, tokens: int, count: int = 7) -> float:
    """Median seconds to the first token of such a prompt on the idle fleet."""
    asks = [Ask(0.0, tokens)]
    return sorted([(await play(url, asks, f"alone/{tokens}/{i}"))[0] for i in range(count)])[
        count // 2
    ]
