"""What a message costs on a link between a router and an instance, without any model.

An instance with an engine that answers at once (the double of tests/server) runs as a process of
its own, a link in this one. Measured: requests with one token each, one after another (the latency
that a link and the instance's server add), and long streams at full speed (tokens a second).

Run it on an otherwise idle machine: ``python benchmarks/fleet_link.py --save PATH``.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pla_serve.bench.save import write_json
from pla_serve.environment import describe
from pla_serve.fleet.link.own import InstanceLink
from pla_serve.fleet.link.protocol import (
    InstanceFacts,
    InstanceReport,
    Link,
    LossCause,
    RequestAnswer,
)
from pla_serve.wire.engine import AddRequest, Output, Rejected, SamplingParams

ROOT = Path(__file__).parents[1]


class Owner:
    """Counts news and says when an answer has ended."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self.tokens = 0
        self.outputs = 0
        self.waiting: dict[str, asyncio.Future[None]] = {}

    def connected(self, link: Link, facts: InstanceFacts) -> None:
        self.up.set()

    def report(self, link: Link, report: InstanceReport) -> None: ...

    def lost(self, link: Link, reason: str, cause: LossCause) -> None:
        if self.waiting:
            raise SystemExit(f"the link was lost: {reason}")

    def message(self, link: Link, message: RequestAnswer) -> None:
        if isinstance(message, Rejected):
            raise SystemExit(f"refused: {message.reason}")
        if isinstance(message, Output):
            self.outputs += 1
            self.tokens += len(message.tokens)
            if message.finish_reason is not None:
                self.waiting.pop(message.id).set_result(None)


def request(id: str, prompt: int, tokens: int) -> AddRequest:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    return AddRequest(
        id=id, prompt=[index % 250 for index in range(prompt)], sampling=sampling, arrival=0.0
    )


async def ask(link: InstanceLink, owner: Owner, what: AddRequest) -> float:
    """Seconds from sending to the last token."""
    done = owner.waiting[what.id] = asyncio.get_running_loop().create_future()
    began = time.perf_counter()
    link.send(what)
    await done
    return time.perf_counter() - began


async def measure(url: str, count: int, seconds: float) -> dict[str, Any]:
    owner = Owner()
    link = InstanceLink(url, owner)
    running = asyncio.create_task(link.run())
    await owner.up.wait()
    result: dict[str, Any] = {}
    for prompt in (16, 1024):
        for warm in range(50):
            await ask(link, owner, request(f"w{prompt}-{warm}", prompt, 1))
        times = [await ask(link, owner, request(f"r{prompt}-{i}", prompt, 1)) for i in range(count)]
        cuts = statistics.quantiles(times, n=100)
        result[f"round trip of {prompt} tokens, ms"] = {
            "p50": 1000 * statistics.median(times),
            "p99": 1000 * cuts[98],
        }
    for streams in (1, 32):
        owner.outputs = 0
        each = 2000 if streams == 1 else 500
        began, own = time.perf_counter(), time.process_time()
        rounds = 0
        while time.perf_counter() - began < seconds:
            rounds += 1
            await asyncio.gather(
                *(
                    ask(link, owner, request(f"s{streams}-{rounds}-{index}", 16, each))
                    for index in range(streams)
                )
            )
        spent, cpu = time.perf_counter() - began, time.process_time() - own
        result[f"{streams} streams"] = {
            "messages a second": owner.outputs / spent,
            "messages a second of this process's CPU": owner.outputs / cpu,
        }
    await link.close()
    await running
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each stream measurement")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.server.serve_fake", "5"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "FAKE_PAUSE": "0", "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None
    try:
        port = child.stdout.readline().split()[0]
        with asyncio.Runner(loop_factory=_loop()) as runner:
            result = runner.run(measure(f"http://127.0.0.1:{port}", options.count, options.seconds))
    finally:
        child.terminate()
        child.wait()
    for name, values in result.items():
        print(name, {key: round(value, 3) for key, value in values.items()})
    if options.save:
        write_json(
            options.save,
            {"command": " ".join(sys.argv), "environment": describe(), "result": result},
        )


def _loop() -> Any:
    import uvloop

    return uvloop.new_event_loop


if __name__ == "__main__":
    main()
