"""The headline's traffic against a policy on virtual time: a search of knobs takes seconds."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from pla_serve.bench.calibrate import DECODERS, PREFILL_TOKENS, Costs
from pla_serve.bench.workload import BenchWorkload, WorkloadConfig, generate
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, BatchClass, Chunk
from pla_serve.policy.registry import create_policy
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.machine import KnownCost, Machine
from pla_serve.simulator.request import SimulatedRequest

SHORT = 256
"""New tokens."""
TEMPLATE_TOKENS = 20
"""That the chat template puts around a message, roughly."""
BLOCK = 16
"""Tokens; a history is found in the cache by whole blocks."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """One policy's numbers, means over the seeds; seconds."""

    entry: str
    short_ttft_p90: float
    long_ttft_p99: float
    requests_per_second: float
    long_p99_to_plain: float
    """To the first entry, seed by seed."""
    rate_to_plain: float


def search(
    entries: list[str], config: WorkloadConfig, load: float, machine: Machine, seeds: int
) -> list[Simulated]:
    """Every entry on the same ``seeds`` workloads at this load; ratios are to the first one."""
    cost = KnownCost(machine.profile)
    found = defaultdict(list)
    for seed in range(seeds):
        shape = replace(config, seed=seed, rate=1.0)
        rate = load * capacity(cost, generate(shape))
        workload = generate(replace(shape, rate=rate))
        for entry in entries:
            found[entry].append(_run(entry, workload, machine, cost))
    plain = np.array(found[entries[0]])
    rows = []
    for entry in entries:
        numbers = np.array(found[entry])
        short, long, rate = numbers.mean(axis=0).tolist()
        _, long_ratio, rate_ratio = (numbers / plain).mean(axis=0).tolist()
        rows.append(Simulated(entry, short, long, rate, long_ratio, rate_ratio))
    return rows


def capacity(cost: CostModel, workload: BenchWorkload) -> float:
    """Requests a second, as `bench` reckons it from measurements of an idle server."""
    prefill = tuple((n, cost.prefill_seconds(n, 0)) for n in PREFILL_TOKENS)
    step = Batch(BatchClass.DECODE, (), tuple(Chunk(str(i), 1, 64) for i in range(DECODERS)))
    return Costs(prefill, cost.seconds(step) / DECODERS).capacity(workload)


def _run(
    entry: str, workload: BenchWorkload, machine: Machine, cost: CostModel
) -> tuple[float, float, float]:
    """Short P90 and long P99 of TTFT, and requests a second."""
    session = _Sessions(entry, workload, machine, cost)
    session.run()
    jobs = session.jobs
    short = [job.ttft for job in jobs if job.new_tokens <= SHORT]
    long = [job.ttft for job in jobs if job.new_tokens > SHORT]
    rate = len(jobs) / max(job.finished for job in jobs)
    return float(np.percentile(short, 90)), float(np.percentile(long, 99)), rate


class _Sessions:
    """Drives one instance; a turn comes when the answer before it is there and the user thought."""

    def __init__(
        self, entry: str, workload: BenchWorkload, machine: Machine, cost: CostModel
    ) -> None:
        base = PolicyConfig(max_batch_tokens=machine.max_batch_tokens, layers=machine.layers)
        policy = create_policy(entry, base, cost)
        self.jobs: list[SimulatedRequest] = []
        self._workload = workload
        self._instance = SimulatedInstance(
            policy, cost, machine.layers, lambda job, now: None, self._answered, decodes=True
        )
        self._due: list[tuple[float, int, int, int]] = []
        """Time, session, turn, tokens of the conversation so far."""
        self._turns: dict[str, tuple[int, int]] = {}

    def run(self) -> None:
        self._due = [(s.start, number, 0, 0) for number, s in enumerate(self._workload.sessions)]
        heapq.heapify(self._due)
        now, instance = 0.0, self._instance
        while self._due or instance.jobs:
            if self._due and self._due[0][0] <= instance.wake_at:
                due, number, turn, past = heapq.heappop(self._due)
                now = max(now, due)
                instance.submit(self._job(due, number, turn, past), now)
            else:
                now = instance.wake_at
                instance.advance(now)

    def _job(self, due: float, number: int, turn: int, past: int) -> SimulatedRequest:
        asked = self._workload.sessions[number].turns[turn]
        cached = past // BLOCK * BLOCK
        new = asked.new_tokens + TEMPLATE_TOKENS + past - cached
        job = SimulatedRequest(f"{number}.{turn}", due, new, cached, asked.max_tokens)
        self._turns[job.id] = (number, turn + 1)
        self.jobs.append(job)
        return job

    def _answered(self, job: SimulatedRequest, now: float) -> None:
        number, turn = self._turns[job.id]
        turns = self._workload.sessions[number].turns
        if turn < len(turns):
            past = job.prompt_tokens + job.output_tokens - 1
            heapq.heappush(self._due, (now + turns[turn].think, number, turn, past))
