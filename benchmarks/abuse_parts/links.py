"""Frames that no router would send, over the link of an instance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, WebSocketException
from websockets.typing import Subprotocol

from abuse_parts.sockets import Address
from pla_serve.wire.link import PATH, SUBPROTOCOL

NUMBERS = (0, -1, 1, 2**31, -(2**63), 2**63, 1e308, float("nan"), float("inf"), -1e-320)
FRAMES = 200
"""Most frames on one connection."""


def sampling(rng: Random) -> dict[str, Any]:
    return {"max_tokens": 2, "temperature": 0.0}


def messages(rng: Random) -> list[dict[str, Any]]:
    """One good message of each kind. ``type`` is msgspec's tag."""
    id = f"r{rng.randrange(5)}"
    request = {
        **{"type": "add", "id": id, "prompt": [1, 2, 3], "sampling": sampling(rng)},
        **{"arrival": 0.0, "deadline": None, "priority": 0},
    }
    return [
        request,
        {"type": "abort", "id": id},
        {"type": "reserve", "request": request, "source": b"offer", "lease_seconds": 1.0},
        {"type": "begin", "id": id, "tokens": [5]},
        {"type": "lend", "id": id, "tokens": [1] * 64},
        {"type": "release", "id": id},
        {"type": "role", "role": "mixed"},
        {"type": "drain", "on": False},
        {"type": "alive"},
    ]


def odd_value(rng: Random) -> Any:
    return rng.choice(
        (
            *(rng.choice(NUMBERS), None, True, "", "x" * rng.choice((1, 10**5)), b"\xff" * 9),
            *([], [-1] * rng.choice((1, 10**5)), {}, {"a": {}}, [[[]]], "a\nb\x1b[31m"),
        )
    )


def change(rng: Random, message: Any) -> Any:
    """A message with a value somewhere in it replaced, dropped or added."""
    if not isinstance(message, dict) or rng.random() < 0.05:
        return odd_value(rng)
    changed = dict(message)
    key = rng.choice([*message, "logprobs", "seed", "n", "generated", "hand_over", "x"])
    if isinstance(changed.get(key), dict) and rng.random() < 0.7:
        changed[key] = change(rng, changed[key])
    elif rng.random() < 0.15:
        changed.pop(key, None)
    elif key != "type" or rng.random() < 0.1:
        changed[key] = odd_value(rng)
    return changed


def frame(rng: Random) -> bytes | str:
    """One frame: good, changed, damaged, or none at all."""
    chosen = rng.choices(messages(rng), k=rng.choice((1, 1, 3, 50)))
    if rng.random() < 0.8:
        chosen = [change(rng, message) for message in chosen]
    encoded = msgspec.msgpack.encode(chosen)
    way = rng.random()
    if way < 0.1:
        return rng.randbytes(rng.choice((1, 100, 10**5)))
    if way < 0.2:
        return encoded[: rng.randrange(len(encoded))]
    if way < 0.25:
        return rng.choice(("text", "[]", "\x00"))
    if way < 0.3:
        return b"\x91" * rng.choice((10, 100_000))
    return encoded


async def talk(rng: Random, address: Address, *, seconds: float) -> dict[str, int]:
    """Send frames over new links for a while. Returns what became of them, counted."""
    counts: dict[str, int] = {}

    def count(what: str, by: int = 1) -> None:
        counts[what] = counts.get(what, 0) + by

    end = asyncio.get_running_loop().time() + seconds
    headers = {"Authorization": f"Bearer {address.key}"} if address.key else {}
    if rng.random() < 0.2:
        headers["Origin"] = "http://evil.example"
    while asyncio.get_running_loop().time() < end:
        try:
            async with asyncio.timeout(10):
                await _one(rng, f"ws://{address.host}:{address.port}{PATH}", headers, count)
        except InvalidHandshake as error:
            count(f"refused {getattr(getattr(error, 'response', None), 'status_code', '')}")
            await asyncio.sleep(0.05)
        except (OSError, WebSocketException, TimeoutError):
            count("cut off")
    return counts


async def _one(
    rng: Random, url: str, headers: dict[str, str], count: Callable[[str, int], None]
) -> None:
    async with connect(
        url,
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        additional_headers=headers,
        compression=None,
        proxy=None,
        ping_interval=None,
    ) as link:
        for _ in range(rng.randrange(1, FRAMES)):
            await link.send(frame(rng))
            count("frames", 1)
            if rng.random() < 0.02:
                await link.ping(rng.randbytes(100))
