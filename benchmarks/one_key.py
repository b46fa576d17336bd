"""One key floods a server while clients of another key are measured.

Floods: eight requests of 256 choices each, 500 streams, and 24 and 64 streams of costly regular
expressions. The other key's times to first tokens and between tokens are compared with those
without a flood, and must not be more than three times as long.

    python benchmarks/one_key.py --tiny -o benchmarks/results/one_key.json    # two minutes
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import signal
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from abuse import INNOCENT, MOST_GROWTH, MOST_HEALTH, MOST_TIMES, loop_lag, server
from abuse_parts.innocents import Innocents, Seen
from abuse_parts.processes import ProcessWatch
from abuse_parts.rounds import give_way
from abuse_parts.sockets import Address
from abuse_parts.tiny import make_tiny

from pla_serve.bench.save import write_json
from pla_serve.environment import describe

FLOODS: dict[str, tuple[int, dict[str, Any]]] = {
    "choices": (8, {"n": 256, "max_tokens": 32}),
    "streams": (500, {"stream": True, "max_tokens": 64}),
    "regexes_24": (24, {"stream": True, "max_tokens": 200}),
    "regexes_64": (64, {"stream": True, "max_tokens": 200}),
}
"""Requests at once, and what each asks for."""
PROMPT = "Tell me something about mountains, and begin with the highest. "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a model for pla-serve; SmolLM2 by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    parser.add_argument("--seconds", type=float, default=15, help="of each flood")
    parser.add_argument("--clients", type=int, default=2, help="streams of the other key at once")
    parser.add_argument("--only", choices=tuple(FLOODS), help="one flood instead of all")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends with this program
    floods = (options.only,) if options.only else tuple(FLOODS)
    with tempfile.TemporaryDirectory() as folder:
        words = [] if options.model is None else [options.model]
        words += ["--kv-cache-gib", "1"]
        if options.tiny:
            tiny = str(make_tiny(Path(folder)))
            words = [tiny, "--load-format", "dummy", "--kv-cache-gib", "0.1"]
        with server("serve", words) as (address, pid):
            result = asyncio.run(run(address, pid, floods, options.seconds, options.clients))
    content = {"environment": describe(), "model": options.model or "tiny", **result}
    if options.output is not None:
        write_json(options.output, content)
    broken = [f"{name}: {what}" for name, one in result["floods"].items() for what in one["broken"]]
    print("\n".join(broken) or "Everything held.")
    return 1 if broken else 0


async def run(
    address: Address, pid: int, floods: tuple[str, ...], seconds: float, clients: int
) -> dict[str, Any]:
    """Measure without a flood and with each. JSON-ready."""
    innocent = Address(address.host, address.port, INNOCENT)
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, Any] = {}
    with ProcessPoolExecutor(1, spawn) as pool:
        async with Innocents(innocent, count=clients, pause=0.1) as innocents:
            await asyncio.sleep(3.0)  # the first requests find cold caches
            innocents.seen = calm = Seen()
            await asyncio.sleep(seconds)
            watch = ProcessWatch(pid)
            for name in floods:
                innocents.seen = seen = Seen()
                flooding = asyncio.get_running_loop().run_in_executor(
                    pool, flood, name, address, seconds
                )
                looking = asyncio.create_task(watch.run())
                counts = await flooding
                looking.cancel()
                results[name] = report(calm, seen, watch) | {"answers": counts}
                innocents.seen = Seen()
                print(name, results[name], flush=True)
                await asyncio.sleep(3.0)
    lag = await loop_lag(innocent)
    return {
        "without": calm.summary(),
        "floods": results,
        "event_loop_held_at_most_seconds": lag,
    }


def report(calm: Seen, seen: Seen, watch: ProcessWatch) -> dict[str, Any]:
    """What the other key saw, and which bounds were broken."""
    before, during = calm.summary(), seen.summary()
    ratios = {
        name: round(during[name] / before[name], 2)
        for name in ("ttft_p90", "itl_p99")
        if before[name] and during[name]
    }
    broken = [
        f"{name} is {times} times as long" for name, times in ratios.items() if times > MOST_TIMES
    ]
    broken += [f"it failed: {during['reasons']}"] if seen.failures else []
    broken += [] if len(ratios) == 2 else ["it got no answers"]
    if (during["health_worst"] or 0.0) > MOST_HEALTH:
        broken.append(f"/health took {during['health_worst']:.2f} s")
    broken += [f"processes ended: {watch.ended()}"] if watch.ended() else []
    grown = {name: round(mib) for name, mib in watch.growth.items() if mib > MOST_GROWTH}
    broken += [f"memory grew by MiB: {grown}"] if grown else []
    return {
        "times_longer": ratios,
        "seen": during | {"longest_gap": max(seen.gaps, default=None)},
        "memory_growth_mib": {name: round(mib, 1) for name, mib in watch.growth.items()},
        "broken": broken,
    }


def flood(name: str, address: Address, seconds: float) -> dict[str, int]:
    """Run one flood; for a process of its own. Returns how often it was answered, by status."""
    give_way()
    return dict(asyncio.run(_flood(name, address, seconds)))


async def _flood(name: str, address: Address, seconds: float) -> Counter[str]:
    count, body = FLOODS[name]
    counts: Counter[str] = Counter()
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(
        base_url=f"http://{address.host}:{address.port}",
        headers={"Authorization": f"Bearer {address.key}"},
        timeout=120.0,
        limits=limits,
        trust_env=False,
    ) as client:
        tasks = [
            asyncio.create_task(_ask_again(client, number, name, body, counts))
            for number in range(count)
        ]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return counts


async def _ask_again(
    client: httpx.AsyncClient, number: int, name: str, body: dict[str, Any], counts: Counter[str]
) -> None:
    turn = 0
    while True:
        turn += 1
        asked = {"prompt": f"{PROMPT}{number}.{turn}", **body}
        if name.startswith("regexes"):
            asked["guided_regex"] = f"(a{{{100 + (7 * number + turn) % 60}}}){{150}}"
        try:
            async with client.stream("POST", "/v1/completions", json=asked) as answer:
                counts[str(answer.status_code)] += 1
                async for _ in answer.aiter_raw():
                    pass
        except httpx.HTTPError as error:
            counts[type(error).__name__] += 1
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
