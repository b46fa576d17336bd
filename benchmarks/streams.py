"""Streams beside long prompts over HTTP: how long they pause, and what the long ones pay.

    python benchmarks/streams.py                        # length-aware and fcfs, three minutes
    python benchmarks/streams.py --vllm .venv-vllm/bin/python
    python benchmarks/streams.py --url llama-server=http://127.0.0.1:8080

For each server a few streams decode; then long prompts come at once. Counted are the times between
tokens from that moment to the last long's first token, and how long the longs took. Before it the
same streams decode alone: the idle gap. Servers take turns, and those that are not measured are
stopped meanwhile. SmolLM2-135M, float32, prompts of random token ids.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from vs_vllm import MODEL, Side, ours

from pla_serve.bench.client import RequestTarget, one
from pla_serve.bench.save import write_json
from pla_serve.bench.servers import Started, free_port, started
from pla_serve.bench.sse import DONE, EventSplitter, decode
from pla_serve.bench.text import FillerPart, WordFiller
from pla_serve.bench.transport import HttpTransport
from pla_serve.engine.loading import NoLoadingProgress, resolve
from pla_serve.environment import describe

LONG_TOKENS = 5250
STREAM_TOKENS = 32
FIRST = 8
"""Tokens that every stream has got when the longs come."""
IDLE = 40
"""Tokens of each stream of which the idle gap is the median."""
MOST = 2000
"""Tokens of a stream: more than it can get before the longs are done."""
SETTINGS = ((4, 1), (8, 2))
"""Streams and longs."""
WANTED = {"pause": 10.0, "itl": 5.0, "long": 1.15}
"""Longest pause and ITL P99 in idle gaps, and the longs' time in that of fcfs."""
OURS, PLAIN = "length-aware", "fcfs"
console = Console()


@dataclass(frozen=True, slots=True)
class Seen:
    """One experiment with one server; seconds."""

    side: str
    round: int
    streams: int
    longs: int
    idle_gap: float
    pauses: list[float]
    """Longest pause of each stream."""
    itl_p50: float
    itl_p99: float
    tokens: int
    """Of all streams while longs waited."""
    long_seconds: list[float]
    """From sending to the first token of each long."""


@dataclass(slots=True)
class Client:
    """Asks one server. Every prompt is new."""

    transport: HttpTransport
    filler: WordFiller
    asked: int = 0

    def prompt(self, tokens: int) -> list[int]:
        self.asked += 1
        return self.filler.ids([FillerPart(str(self.asked), tokens)])

    async def stream(self, times: list[float], tokens: int) -> None:
        """Note when each token comes, until the answer ends or the task is cancelled."""
        target = RequestTarget(MODEL, "completions")
        body = target.body(self.prompt(STREAM_TOKENS), tokens)
        clock, splitter = asyncio.get_running_loop().time, EventSplitter()
        async with self.transport.post(target.path, body) as (status, portions):
            if status != 200:
                raise RuntimeError(f"the server refused a stream with HTTP {status}")
            async for portion in portions:
                now = clock()
                events = [decode(payload) for payload in splitter.feed(portion) if payload != DONE]
                times += [now for event in events if any(c.content for c in event.choices)]

    async def long(self) -> float:
        """Seconds from sending a long prompt to its only token."""
        target = RequestTarget(MODEL, "completions")
        answer = await one(self.transport, target, self.prompt(LONG_TOKENS), 1)
        return (answer.first or 0.0) - (answer.sent or 0.0)

    async def warm_up(self) -> None:
        target = RequestTarget(MODEL, "completions")
        for tokens in (16, 1024):
            await one(self.transport, target, self.prompt(tokens), 8)
        await self.idle_gap(4)

    async def idle_gap(self, streams: int) -> float:
        """Median time between two tokens of so many streams alone."""
        times: list[list[float]] = [[] for _ in range(streams)]
        await asyncio.gather(*(self.stream(row, IDLE) for row in times))
        return statistics.median(b - a for row in times for a, b in pairwise(row[FIRST:]))

    async def experiment(self, side: str, number: int, streams: int, longs: int) -> Seen:
        idle = await self.idle_gap(streams)
        clock = asyncio.get_running_loop().time
        times: list[list[float]] = [[] for _ in range(streams)]
        tasks = [asyncio.create_task(self.stream(row, MOST)) for row in times]
        try:
            while any(len(row) < FIRST for row in times):
                await asyncio.sleep(0.01)
                for task in tasks:
                    if task.done():
                        task.result()
            began = clock()
            waited = await asyncio.gather(*(self.long() for _ in range(longs)))
            ended = clock()
            while any(row[-1] < ended for row in times):  # a pause may last beyond the end
                await asyncio.sleep(0.01)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        gaps = [[b - a for a, b in pairwise(row) if b > began and a < ended] for row in times]
        every = [gap for row in gaps for gap in row]
        p50, p99 = (float(value) for value in np.percentile(every, (50, 99)))
        pauses = [max(row) for row in gaps]
        return Seen(side, number, streams, longs, idle, pauses, p50, p99, len(every), list(waited))


def vllm(python: Path, folder: Path) -> Side:
    """vLLM as it comes, but for its prefix cache, which would find nothing here, and every core."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--dtype", "float32"]
    command += ["--max-model-len", "8192", "--no-enable-prefix-caching"]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return Side("vLLM", tuple(command), os.environ | settings, "/health")


@contextmanager
def up(side: Side) -> Iterator[Started]:
    port = free_port()
    command = [*side.command, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with started(command, url, ready=side.ready, environment=side.environment) as server:
        yield server


async def measure(url: str, side: str, number: int, options: argparse.Namespace) -> list[Seen]:
    transport = HttpTransport(url)
    client = Client(transport, WordFiller(secrets.token_hex(8), (), None))
    try:
        if number == 0:
            await client.warm_up()
        settings = SETTINGS[:1] if options.quick else SETTINGS
        return [await client.experiment(side, number, *setting) for setting in settings]
    finally:
        await transport.close()


def run(options: argparse.Namespace) -> list[Seen]:
    """All experiments, the servers in turn."""
    folder = resolve(options.model, progress=NoLoadingProgress()).folder
    sides = [
        ours(folder, "float32", ["--policy", policy, "--kv-cache-gib", "1"])
        for policy in options.policies
    ]
    names = list(options.policies)
    if options.vllm is not None:
        sides.append(vllm(options.vllm, folder))
        names.append("vLLM")
    found: list[Seen] = []
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(up(side)) for name, side in zip(names, sides, strict=True)
        }
        urls = {name: server.url for name, server in servers.items()}
        urls |= dict(entry.split("=", 1) for entry in options.url)
        for number in range(options.rounds):
            for name, url in urls.items():
                with ExitStack() as pauses:
                    for other, server in servers.items():
                        if other != name:
                            pauses.enter_context(server.paused())
                    rows = asyncio.run(measure(url, name, number, options))
                found += rows
                for row in rows:
                    console.print(line(row), style="dim", highlight=False)
    return found


def line(row: Seen) -> str:
    return (
        f"{row.side}: {row.streams} streams, {row.longs} longs: idle gap {row.idle_gap:.3f} s, "
        f"longest pause {max(row.pauses):.2f}, ITL P99 {row.itl_p99:.3f}, "
        f"long {max(row.long_seconds):.2f} s"
    )


def summary(found: list[Seen], plain: str) -> list[dict[str, object]]:
    """Medians over the rounds of each server and setting, and what the project promises."""
    rows: list[dict[str, object]] = []
    for streams, longs in SETTINGS:
        group = [row for row in found if (row.streams, row.longs) == (streams, longs)]
        base = [max(row.long_seconds) for row in group if row.side == plain]
        for side in dict.fromkeys(row.side for row in group):
            mine = [row for row in group if row.side == side]
            middle = {
                "idle_gap": statistics.median(row.idle_gap for row in mine),
                "longest_pause": statistics.median(max(row.pauses) for row in mine),
                "itl_p99": statistics.median(row.itl_p99 for row in mine),
                "long": statistics.median(max(row.long_seconds) for row in mine),
            }
            ratios = {
                "pause": middle["longest_pause"] / middle["idle_gap"],
                "itl": middle["itl_p99"] / middle["idle_gap"],
                "long": middle["long"] / statistics.median(base) if base else None,
            }
            rows.append(
                {"side": side, "streams": streams, "longs": longs, **middle, "ratios": ratios}
            )
    return rows


def show(rows: list[dict]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="medians over rounds; x: idle gaps, and fcfs's time")
    for head in ("", "streams", "longs", "idle gap", "pause", "x", "ITL P99", "x", "long", "x"):
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        cells = [row["side"], str(row["streams"]), str(row["longs"]), f"{row['idle_gap']:.3f}"]
        for name, key in (("longest_pause", "pause"), ("itl_p99", "itl"), ("long", "long")):
            ratio = row["ratios"][key]
            ours_missed = ratio is not None and ratio > WANTED[key] and row["side"] == OURS
            shown = "-" if ratio is None else f"{ratio:.2f}{' miss' if ours_missed else ''}"
            cells += [f"{row[name]:.3f}", shown]
        table.add_row(*cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--policies", nargs="+", default=[OURS, PLAIN])
    parser.add_argument("--vllm", type=Path, help="Python of an environment with vLLM")
    parser.add_argument("--url", action="append", default=[], help="NAME=URL of a running server")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="four streams and one long only")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = run(options)
    rows = summary(found, PLAIN)
    show(rows)
    if options.json is not None:
        content = {
            "environment": describe(),
            "command": " ".join(["python", "benchmarks/streams.py", *sys.argv[1:]]),
            "long_tokens": LONG_TOKENS,
            "summary": rows,
            "runs": [asdict(row) for row in found],
        }
        write_json(options.json, content)


if __name__ == "__main__":
    main()
