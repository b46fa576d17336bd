"""What a step costs in vLLM's scheduler, default and ours, with 1,000 requests waiting; no model.

    PYTHONPATH=src:. .venv-vllm/bin/python benchmarks/vllm_overhead.py

Both get the same traffic on a made-up clock: nine shorts for each long, a new request for each that
was admitted, 128 places. Timed are `schedule` and `update_from_output`, and what an arrival takes.
Processor time of the thread, so that other processes do not count. Rounds alternate; the garbage
collector is off, as vLLM freezes its heap.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from random import Random

from tests.plugins.vllm.harness import Engine, make_request, make_scheduler
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from pla_serve.environment import describe
from pla_serve.plugins.vllm import LengthAwareScheduler

KINDS = {"default": AsyncScheduler, "plugin": LengthAwareScheduler}


class Timed:
    """Counts the seconds of calls to a scheduler's methods."""

    def __init__(self, scheduler: object, *names: str) -> None:
        self.seconds = 0.0
        for name in names:
            setattr(scheduler, name, self._around(getattr(scheduler, name)))

    def _around(self, method):  # type: ignore[no-untyped-def]
        def timed(*args: object) -> object:
            start = time.thread_time()
            try:
                return method(*args)
            finally:
                self.seconds += time.thread_time() - start

        return timed


def measure(kind: str, waiting: int, steps: int, warm: int, seed: int) -> list[float]:
    """Seconds of each step."""
    with tempfile.TemporaryDirectory() as folder:
        scheduler = make_scheduler(KINDS[kind], Path(folder), seqs=128, blocks=40_000)
    engine, rng, count = Engine(scheduler), Random(seed), 0
    timed = Timed(scheduler, "schedule", "update_from_output", "add_request")
    seconds = []
    for step in range(warm + steps):
        before = timed.seconds
        while len(scheduler.waiting) < waiting:
            tokens = rng.randint(2048, 4096) if rng.random() < 0.1 else rng.randint(8, 200)
            engine.add(make_request(f"r{count}", tokens, answer=16))
            count += 1
            if step == 0:
                before = timed.seconds
        engine.step()
        if step >= warm:
            seconds.append(timed.seconds - before)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warm", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    gc.disable()
    found: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for seed in range(options.rounds):
        for kind, rounds in found.items():
            rounds.append(measure(kind, options.waiting, options.steps, options.warm, seed))
    summary = {
        kind: {
            "mean_us": statistics.median(statistics.fmean(row) for row in rounds) * 1e6,
            "median_us": statistics.median(statistics.median(row) for row in rounds) * 1e6,
            "p99_us": statistics.median(sorted(row)[-len(row) // 100] for row in rounds) * 1e6,
        }
        for kind, rounds in found.items()
    }
    ratios = {
        name: summary["plugin"][name] / summary["default"][name] for name in summary["plugin"]
    }
    print(json.dumps({"summary": summary, "ratios": ratios}, indent=1))
    if options.output:
        content = {
            "environment": describe(),
            "waiting": options.waiting,
            "steps": options.steps,
            "rounds": options.rounds,
            "summary": summary,
            "ratios": ratios,
        }
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
