"""Fuzzes a live server with so many bodies and frames of links: no 5xx but 503, no restart.

Unlike `abuse.py`, which attacks for a time while others are measured, this program counts: what it
sends follows from the seed, and a fault is printed with its number. One body in 20 may be large or
a costly grammar, as those of `abuse.py` are. The server is a real one with a tiny model; bodies go
over HTTP, frames over its link.

    python benchmarks/fuzz.py --bodies 200000 --frames 20000 -o benchmarks/results/fuzz.json
    python benchmarks/fuzz.py --seed 3 --bodies 500 --frames 500
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from random import Random

from abuse import LINK, server
from abuse_parts.bodies import Body, hostile_bodies, hostile_fields
from abuse_parts.links import frame
from abuse_parts.processes import ProcessWatch
from abuse_parts.sockets import Address, post
from abuse_parts.tiny import make_tiny
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from pla_serve.bench.save import write_json
from pla_serve.environment import describe
from pla_serve.wire.link import PATH, SUBPROTOCOL

AT_ONCE = 8
ANSWER_SECONDS = 60.0
COSTLY_EVERY = 20
FRAMES_PER_LINK = 50


@dataclass
class Found:
    """What became of everything that was sent."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def mixed_bodies(rng: Random) -> Iterator[Body]:
    """Without end; one in `COSTLY_EVERY` is of any kind, the others are quick to refuse."""
    costly, quick = hostile_bodies(rng), hostile_fields(rng)
    for number in count():
        yield next(quick if number % COSTLY_EVERY else costly)


async def send_bodies(seed: int, total: int, address: Address, found: Found) -> None:
    """Send the first ``total`` bodies of a seed, several at once."""
    bodies: Iterator[tuple[int, Body]] = enumerate(
        islice(mixed_bodies(Random(f"bodies/{seed}")), total)
    )

    async def work() -> None:
        for number, (path, body) in bodies:
            status = await post(address, path, body, seconds=ANSWER_SECONDS)
            found.counts[f"body {status}"] += 1
            if status.startswith("5") and status != "503":
                found.faults.append(f"body {number}: {status} {path} {body[:300]!r}")
            if number % 1000 == 999:
                print(f"{number + 1} bodies: {dict(found.counts)}", flush=True)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))


async def send_frames(seed: int, total: int, address: Address, found: Found) -> None:
    """Send ``total`` frames; a link that the server ends is opened anew."""
    sent = 0
    while sent < total:
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                async with _link(address) as link:
                    for _ in range(min(FRAMES_PER_LINK, total - sent)):
                        await link.send(frame(Random(f"frames/{seed}/{sent}")))
                        sent += 1
                        found.counts["frame"] += 1
        except WebSocketException:
            found.counts["link ended"] += 1
        except (OSError, TimeoutError) as error:
            found.faults.append(f"frame {sent}: {type(error).__name__} {error}")
            sent += 1


def _link(address: Address) -> connect:
    return connect(
        f"ws://{address.host}:{address.port}{PATH}",
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        additional_headers={"Authorization": f"Bearer {LINK}"},
        compression=None,
        proxy=None,
        ping_interval=None,
    )


async def run(seed: int, bodies: int, frames: int, address: Address, pid: int) -> Found:
    """Send everything and look whether some process has ended."""
    found = Found()
    watch = ProcessWatch(pid)
    looking = asyncio.create_task(watch.run())
    await asyncio.sleep(1.0)
    await send_bodies(seed, bodies, address, found)
    await send_frames(seed, frames, Address(address.host, address.port, LINK), found)
    await asyncio.sleep(2.0)
    looking.cancel()
    found.faults += [f"a process ended: {name}" for name in watch.ended()]
    if await post(address, "/v1/completions", b'{"prompt":"a","max_tokens":2}') != "200":
        found.faults.append("a plain request is not served afterwards")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bodies", type=int, default=200_000)
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers end with this program
    environment, began = describe(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = [str(make_tiny(Path(folder))), "--load-format", "dummy", "--kv-cache-gib", "0.1"]
        words += ["--max-model-len", "128"]  # it is reading that is tried, not generation
        with server("serve", words) as (address, pid):
            found = asyncio.run(run(options.seed, options.bodies, options.frames, address, pid))
    content = {
        "kind": "fuzzed bodies and frames of links on a live server",
        "seed": options.seed,
        "bodies": options.bodies,
        "frames": options.frames,
        "counts": dict(sorted(found.counts.items())),
        "faults": found.faults,
        "seconds": round(time.perf_counter() - began, 1),
        "environment": environment,
    }
    if options.output is not None:
        write_json(options.output, content)
    print(content["counts"])
    print("\n".join(found.faults) or "Everything held.")
    return 1 if found.faults else 0


if __name__ == "__main__":
    sys.exit(main())
