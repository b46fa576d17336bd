"""The policy inside vLLM against vLLM alone, on virtual time: vLLM's scheduler is the real one, a
step takes what a cost model of SmolLM2-135M on two cores says. Deterministic, so that it can sweep.

    PYTHONPATH=src:. .venv-vllm/bin/python benchmarks/vllm_virtual.py --output ...

Poisson arrivals, messages of LMSYS lengths and documents of 2,048 to 4,096 tokens. A ratio is the
geometric mean over rates and seeds of the value over the default's for the same arrivals.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from tests.plugins.vllm.harness import Engine, make_request, make_scheduler
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput

from pla_serve.environment import describe
from pla_serve.plugins.vllm import LengthAwareScheduler
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import Batch, BatchClass, Chunk
from pla_serve.traces.lengths import Lmsys

MACHINE = CostProfile(9.5e-4, 1.1e-7, 1e-6, 0.0, 0.04)
"""Of vLLM 0.32 with this model on two cores, as benchmarks/results/vs_vllm.json has it."""
SHORT = 256
KEYS = ("short p50", "short p90", "short p99", "long mean", "long p90", "long p99", "req/s")


class Entry(NamedTuple):
    name: str
    plugin: bool = False
    threshold: int = 0
    budget: int = 2048


ALONE = (Entry("default"), Entry("plugin", plugin=True))
TUNED = (
    *(Entry(f"threshold={n}", threshold=n) for n in (64, 128, 256, 512)),
    *(Entry(f"budget={n}", budget=n) for n in (256, 512, 1024)),
    *(
        Entry(f"threshold={n}+budget={m}", threshold=n, budget=m)
        for m in (256, 512, 1024)
        for n in (64, 128, 256)
        if n < m
    ),
)


class Job(NamedTuple):
    at: float
    tokens: int
    answer: int


@dataclass
class Machine(Engine):
    """Steps take what `MACHINE` says."""

    def seconds(self, output: SchedulerOutput) -> float:
        chunks = []
        for name, tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests.get(name)
            history = max(0, request.num_computed_tokens - tokens) if request else 0
            chunks.append(Chunk(name, tokens, history))
        return CostModel(MACHINE).seconds(Batch(BatchClass.MIXED, tuple(chunks)))


def make_jobs(rate: float, share: float, count: int, seed: int) -> list[Job]:
    rng, lengths, now = Random(seed), Lmsys(high=SHORT), 100.0
    jobs = []
    for _ in range(count):
        now += rng.expovariate(rate)
        long = rng.random() < share
        tokens = rng.randint(2048, 4096) if long else lengths.sample(rng)
        jobs.append(Job(now, tokens, rng.randint(8, 16)))
    return jobs


def serve(entry: Entry, jobs: list[Job]) -> dict[str, float]:
    kind = LengthAwareScheduler if entry.plugin else AsyncScheduler
    with tempfile.TemporaryDirectory() as folder:
        scheduler = make_scheduler(kind, Path(folder), budget=entry.budget, seqs=128)
    scheduler.scheduler_config.long_prefill_token_threshold = entry.threshold
    machine, sent = Machine(scheduler), 0
    while sent < len(jobs) or scheduler.has_unfinished_requests():
        if not scheduler.has_unfinished_requests():
            machine.clock.now = max(machine.clock.now, jobs[sent].at)
        while sent < len(jobs) and jobs[sent].at <= machine.clock.now:
            machine.add(make_request(f"r{sent}", jobs[sent].tokens, answer=jobs[sent].answer))
            sent += 1
        machine.step()
    waits = [machine.first[f"r{i}"] - job.at for i, job in enumerate(jobs)]
    short = [waits[i] for i, job in enumerate(jobs) if job.tokens <= SHORT]
    long = [waits[i] for i, job in enumerate(jobs) if job.tokens > SHORT]
    found = {"req/s": len(jobs) / (machine.clock.now - jobs[0].at)}
    for name, values in (("short", short), ("long", long)):
        if values:
            found[f"{name} mean"] = float(np.mean(values))
            for rank in (50, 90, 99):
                found[f"{name} p{rank}"] = float(np.percentile(values, rank))
    return found


def compare(
    entries: tuple[Entry, ...], rates: list[float], share: float, count: int, seeds: int
) -> dict[str, object]:
    rows: dict[str, list[dict[str, float]]] = {entry.name: [] for entry in entries}
    for rate in rates:
        for seed in range(1, seeds + 1):
            jobs = make_jobs(rate, share, count, seed)
            for entry in entries:
                rows[entry.name].append(serve(entry, jobs))
    ratios = {}
    for name, found in rows.items():
        pairs = list(zip(found, rows["default"], strict=True))
        ratios[name] = {
            key: exp(sum(log(mine[key] / own[key]) for mine, own in pairs) / len(pairs))
            for key in KEYS
            if key in found[0]
        }
        print(name, {key: round(value, 3) for key, value in ratios[name].items()}, flush=True)
    return {"rates": rates, "document_share": share, "ratios": ratios, "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    parts = {
        "both classes": ((*ALONE, *TUNED), [0.9, 1.1, 1.3], 0.1, options.requests),
        "short only": (ALONE, [4.0, 6.0], 0.0, options.requests),
        "long only": (ALONE, [0.15, 0.2], 1.0, options.requests // 3),
    }
    found = {}
    for name, (entries, rates, share, count) in parts.items():
        print(name)
        found[name] = compare(entries, rates, share, count, options.seeds)
    if options.output:
        about = {"environment": describe(), "machine": MACHINE.__repr__()}
        options.output.write_text(json.dumps(about | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
