"""What a step costs in vLLM's scheduler, default and ours, with 1,000 requests waiting; no model.

    PYTHONPATH=src:. .venv-vllm/bin/python benchmarks/vllm_overhead.py

``full``: all 128 places decode, so that both schedulers make the same steps and nobody is admitted.
``flow``: nine shorts for each long, answers of 16 tokens, a new request for each that ends; here
the two choose other steps, and ours have more requests in them, since it admits shorts first.
Timed are `schedule`, `update_from_output` and arrivals, in processor time of the thread, so that
other processes do not count. Rounds alternate; the garbage collector is off, as vLLM freezes its
heap.
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
from typing import NamedTuple

from tests.plugins.vllm.harness import Engine, make_request, make_scheduler
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from pla_serve.environment import describe
from pla_serve.plugins.vllm import LengthAwareScheduler

KINDS = {"default": AsyncScheduler, "plugin": LengthAwareScheduler}


PLACES = 128


class Step(NamedTuple):
    seconds: float
    requests: int


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


def measure(kind: str, flow: bool, options: argparse.Namespace, seed: int) -> list[Step]:
    with tempfile.TemporaryDirectory() as folder:
        scheduler = make_scheduler(KINDS[kind], Path(folder), seqs=PLACES, blocks=40_000)
    engine, rng, count = Engine(scheduler), Random(seed), 0
    if not flow:
        engine.add(*(make_request(f"d{i}", 100, answer=1_000_000) for i in range(PLACES)))
        for _ in range(20):
            engine.step()
    timed = Timed(scheduler, "schedule", "update_from_output", "add_request")
    steps = []
    for step in range(options.warm + options.steps):
        new = []
        while len(scheduler.waiting) + len(new) < options.waiting:
            tokens = rng.randint(2048, 4096) if rng.random() < 0.1 else rng.randint(8, 200)
            new.append(make_request(f"r{count}", tokens, answer=16))
            count += 1
        before = timed.seconds
        engine.add(*new)
        requests = len(engine.step())
        if step >= options.warm:
            steps.append(Step(timed.seconds - before, requests))
    return steps


def compare(flow: bool, options: argparse.Namespace) -> dict[str, object]:
    """Medians over rounds."""
    rows: dict[str, list[list[Step]]] = {kind: [] for kind in KINDS}
    for seed in range(options.rounds):
        for kind, rounds in rows.items():
            rounds.append(measure(kind, flow, options, seed))
    found: dict[str, dict[str, float]] = {}
    for kind, rounds in rows.items():
        seconds = [sum(step.seconds for step in steps) / len(steps) for steps in rounds]
        requests = [sum(step.requests for step in steps) / len(steps) for steps in rounds]
        each = [a / b for a, b in zip(seconds, requests, strict=True)]
        found[kind] = {
            "step_us": statistics.median(seconds) * 1e6,
            "requests_a_step": statistics.median(requests),
            "request_us": statistics.median(each) * 1e6,
        }
    ratios = {key: found["plugin"][key] / found["default"][key] for key in found["plugin"]}
    return found | {"ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--warm", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    gc.disable()
    found = {"full": compare(False, options), "flow": compare(True, options)}
    print(json.dumps(found, indent=1))
    if options.output:
        about = {"environment": describe(), "waiting": options.waiting, "places": PLACES}
        options.output.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
