"""Rounds of attacks. A round is a function of the seed and its number, so it can be repeated."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from abuse_parts.bodies import hostile_bodies
from abuse_parts.links import talk
from abuse_parts.sockets import SOCKET_ATTACKS, Address, misbehave, post

KINDS = ("bodies", "bodies", "bodies", "sockets", "sockets", "links", "mixed")
BODIES_AT_ONCE = 8
SOCKETS_AT_ONCE = 16
LINKS_AT_ONCE = 4
NICE = 19


@dataclass
class RoundResult:
    """What became of one round's attacks."""

    number: int
    kind: str
    counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """Requests that were answered with 5xx other than 503."""


def kind_of(seed: int, number: int) -> str:
    return Random(f"{seed}/{number}").choice(KINDS)


@dataclass(frozen=True)
class Target:
    """What is attacked: the address of clients, and those that take links, with their key."""

    address: Address
    links: tuple[Address, ...]


def give_way() -> None:
    """Let this process have what others leave of the processor, as if it ran on another machine.

    Linux shares the processor between sessions first, and then, by niceness, within each. So an
    attacker needs a session of its own, and that one the niceness too (sched(7), "autogroup").
    """
    os.nice(max(0, NICE - os.nice(0)))
    with suppress(OSError):  # it has one already
        os.setsid()
    with suppress(OSError):  # a system without autogroups
        Path("/proc/self/autogroup").write_text(str(NICE))


def attack(seed: int, number: int, target: Target, seconds: float) -> RoundResult:
    """Run one round to its end; for a process of its own."""
    give_way()
    return asyncio.run(_attack(seed, number, target, seconds))


async def _attack(seed: int, number: int, target: Target, seconds: float) -> RoundResult:
    address = target.address
    rng = Random(f"{seed}/{number}")
    result = RoundResult(number, rng.choice(KINDS))
    if rng.random() < 0.15:
        address = Address(address.host, address.port, rng.choice(("", "wrong", "\x7f")))
    work = []
    if result.kind in ("bodies", "mixed"):
        work += [_bodies(Random(rng.random()), address, result) for _ in range(BODIES_AT_ONCE)]
    if result.kind in ("sockets", "mixed"):
        work += [_sockets(Random(rng.random()), address, result) for _ in range(SOCKETS_AT_ONCE)]
    if result.kind in ("links", "mixed"):
        for _ in range(LINKS_AT_ONCE):
            link = rng.choice(target.links)
            key = rng.choice((link.key, link.key, address.key, ""))
            link = Address(link.host, link.port, key)
            work.append(_links(Random(rng.random()), link, result, seconds))
    tasks = [asyncio.create_task(each) for each in work]
    _, left = await asyncio.wait(tasks, timeout=seconds)
    for task in left:
        task.cancel()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome
    return result


def _count(result: RoundResult, what: str) -> None:
    result.counts[what] = result.counts.get(what, 0) + 1


async def _bodies(rng: Random, address: Address, result: RoundResult) -> None:
    for number, (path, body) in enumerate(hostile_bodies(rng)):
        status = await post(address, path, body, seconds=20.0)
        _count(result, f"body {status}")
        if status.startswith("5") and status != "503":
            shown = body[:300] + (b"..." if len(body) > 300 else b"")
            result.faults.append(f"round {result.number}, body {number}: {status} {path} {shown!r}")
        await asyncio.sleep(0)


async def _sockets(rng: Random, address: Address, result: RoundResult) -> None:
    names = sorted(SOCKET_ATTACKS)
    while True:
        name = rng.choice(names)
        _count(result, f"{name} {await misbehave(name, Random(rng.random()), address)}")


async def _links(rng: Random, address: Address, result: RoundResult, seconds: float) -> None:
    for what, number in (await talk(rng, address, seconds=max(0.5, seconds - 1))).items():
        result.counts[f"link {what}"] = result.counts.get(f"link {what}", 0) + number
