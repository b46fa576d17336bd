"""Attacks live servers while others use them: bodies, headers, grammars, frames of links, sockets.

Attacks are grown from a seed, not taken from a list. While they run, clients that behave are
measured: they must not fail, nor wait much longer than without attacks; no process may end, and
nothing may be answered with 5xx but 503 by design.

    python benchmarks/abuse.py --seconds 600 -o benchmarks/results/abuse.json    # serve and a fleet
    python benchmarks/abuse.py --target serve --seconds 60 --tiny                # as CI does
    python benchmarks/abuse.py --target serve --seed 7 --only 12                 # one round again
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from abuse_parts.innocents import Innocents, Seen
from abuse_parts.processes import ProcessWatch
from abuse_parts.rounds import RoundResult, Target, attack
from abuse_parts.sockets import Address
from abuse_parts.tiny import make_tiny

from pla_serve.bench.save import write_json
from pla_serve.bench.servers import free_port, started
from pla_serve.environment import describe

INNOCENT, ATTACKER, LINK = "key-of-innocents", "key-of-attackers", "key-of-links"
MOST_TIMES = 3.0
"""How many times longer innocents may wait than without attacks (TTFT P90, ITL P99)."""
MOST_HEALTH = 0.25
"""Seconds that /health may take."""
MOST_GROWTH = 256.0
"""MiB that one process may grow."""


@dataclass(frozen=True)
class Campaign:
    """What is run against each target."""

    seed: int
    seconds: float
    """Of attacks; the time without them comes before."""
    round_seconds: float
    clients: int
    only: int | None
    """One round, or None for as many as there is time for."""

    @property
    def calm_seconds(self) -> float:
        return min(60.0, max(5.0, self.seconds / 5))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", choices=("serve", "fleet", "both"), default="both")
    parser.add_argument("--seconds", type=float, default=600, help="of attacks, over all targets")
    parser.add_argument("--round-seconds", type=float, default=5)
    parser.add_argument("--clients", type=int, default=2, help="streams of innocents at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one round")
    parser.add_argument("--model", help="a model for pla-serve; SmolLM2 by default")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights")
    parser.add_argument("--no-times", action="store_true", help="times do not decide the verdict")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers end with this program
    targets = ("serve", "fleet") if options.target == "both" else (options.target,)
    campaign = Campaign(
        options.seed,
        options.seconds / len(targets),
        options.round_seconds,
        options.clients,
        options.only,
    )
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        words = [] if options.model is None else [options.model]
        words += ["--kv-cache-gib", "1"]
        if options.tiny:
            tiny = str(make_tiny(Path(folder)))
            words = [tiny, "--load-format", "dummy", "--kv-cache-gib", "0.1"]
        for target in targets:
            with server(target, words) as (address, pid):
                results[target] = asyncio.run(run(campaign, address, pid))
            show(target, results[target])
    content = {"environment": describe(), "seed": options.seed, "targets": results}
    if options.output is not None:
        write_json(options.output, content)
    broken = [
        f"{target}: {problem}"
        for target, result in results.items()
        for problem in [*result["broken"], *([] if options.no_times else result["late"])]
    ]
    print("\n".join(broken) or "Everything held.")
    return 1 if broken else 0


@contextmanager
def server(target: str, model: Sequence[str]) -> Iterator[tuple[Address, int]]:
    """A server or a fleet with keys, until the block ends: its address and first process."""
    port = free_port()
    command = [sys.executable, "-m", "pla_serve", target, *model, "--port", str(port)]
    if target == "fleet":
        command += ["--mixed", "2"]
    environment = {
        **os.environ,
        "PLA_SERVE_API_KEY": f"{INNOCENT} {ATTACKER}",
        "PLA_SERVE_LINK_KEY": LINK,
        "PLA_SERVE_METRICS_KEY": INNOCENT,
    }
    with started(command, f"http://127.0.0.1:{port}", environment=environment) as live:
        yield Address("127.0.0.1", port, ATTACKER), live.pid


async def run(campaign: Campaign, address: Address, pid: int) -> dict[str, Any]:
    """The calm and the attacks on one server. JSON-ready."""
    innocent = Address(address.host, address.port, INNOCENT)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        async with Innocents(innocent, count=campaign.clients, pause=0.1) as innocents:
            await asyncio.sleep(3.0)  # the first requests find cold caches
            innocents.seen = calm = Seen()
            await asyncio.sleep(campaign.calm_seconds)
            watch = ProcessWatch(pid)
            looking = asyncio.create_task(watch.run())
            innocents.seen = attacked = Seen()
            target = Target(address, await link_addresses(innocent))
            rounds = await attacks(campaign, target, pool)
            await asyncio.sleep(1.0)
            looking.cancel()
    lag = await loop_lag(innocent)
    return report(calm, attacked, rounds, watch, lag)


async def link_addresses(address: Address) -> tuple[Address, ...]:
    """Where links are taken: by the instances of a fleet, which its router names, and by itself."""
    found = [Address(address.host, address.port, LINK)]
    async with httpx.AsyncClient(trust_env=False, timeout=30.0) as client:
        for key in (address.key, LINK):
            headers = {"Authorization": f"Bearer {key}"}
            url = f"http://{address.host}:{address.port}/fleet"
            answer = await client.get(url, headers=headers)
            if answer.status_code == 200:
                urls = [httpx.URL(each["url"]) for each in answer.json()["instances"]]
                return (*found, *(Address(url.host, url.port or 80, LINK) for url in urls))
    return tuple(found)


async def attacks(campaign: Campaign, target: Target, pool: Executor) -> list[RoundResult]:
    loop = asyncio.get_running_loop()
    end, number, results = loop.time() + campaign.seconds, 0, []
    while campaign.only is None or not results:
        number = number if campaign.only is None else campaign.only
        left = end - loop.time()
        if left < 1.0 and campaign.only is None:
            break
        seconds = min(campaign.round_seconds, max(left, 1.0))
        results.append(
            await loop.run_in_executor(pool, attack, campaign.seed, number, target, seconds)
        )
        print(f"round {number}: {results[-1].kind} {results[-1].counts}", flush=True)
        number += 1
    return results


async def loop_lag(address: Address) -> str | None:
    """The bucket of the longest time that the event loop was held, from /metrics."""
    headers = {"Authorization": f"Bearer {address.key}"}
    async with httpx.AsyncClient(trust_env=False, timeout=30.0) as client:
        url = f"http://{address.host}:{address.port}/metrics"
        text = (await client.get(url, headers=headers)).text
    buckets = [line for line in text.splitlines() if "event_loop_lag_seconds_bucket" in line]
    total = buckets[-1].rpartition(" ")[2] if buckets else None
    full = [line for line in buckets if line.rpartition(" ")[2] == total]
    return full[0].partition('le="')[2].partition('"')[0] if full else None


def report(
    calm: Seen, attacked: Seen, rounds: list[RoundResult], watch: ProcessWatch, lag: str | None
) -> dict[str, Any]:
    before, during = calm.summary(), attacked.summary()
    faults = [fault for each in rounds for fault in each.faults]
    broken = [f"processes ended: {', '.join(watch.ended())}"] if watch.ended() else []
    broken += [f"{len(faults)} answers of 5xx: {faults[0]}"] if faults else []
    broken += [f"innocents failed: {during['reasons']}"] if attacked.failures else []
    grown = {name: mib for name, mib in watch.growth.items() if mib > MOST_GROWTH}
    broken += [f"memory grew by MiB: {grown}"] if grown else []
    late = [
        f"{name} is {during[name] / before[name]:.1f} times that without attacks"
        for name in ("ttft_p90", "itl_p99")
        if before[name] and during[name] and during[name] > MOST_TIMES * before[name]
    ]
    if (during["health_worst"] or 0.0) > MOST_HEALTH:
        late.append(f"/health took {during['health_worst']:.2f} s")
    kinds: dict[str, Counter[str]] = {}
    for each in rounds:
        kinds.setdefault(each.kind, Counter()).update(each.counts)
    return {
        "without_attacks": before,
        "with_attacks": during,
        "rounds": len(rounds),
        "attacks": {kind: dict(sorted(counts.items())) for kind, counts in kinds.items()},
        "faults": faults,
        "ended": watch.ended(),
        "memory_growth_mib": {name: round(mib, 1) for name, mib in watch.growth.items()},
        "event_loop_held_at_most_seconds": lag,
        "broken": broken,
        "late": late,
    }


def show(target: str, result: dict[str, Any]) -> None:
    """The table for people."""
    print(f"\n{target}: {result['rounds']} rounds")
    print(f"{'':14}{'calm':>12}{'attacked':>12}")
    for name in result["without_attacks"]:
        if name != "reasons":
            pair = (result["without_attacks"][name], result["with_attacks"][name])
            print(f"{name:14}" + "".join(f"{_shown(value):>12}" for value in pair))
    print(f"memory, MiB    {result['memory_growth_mib']}")
    print(f"loop held      {result['event_loop_held_at_most_seconds']} s at most")


def _shown(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
