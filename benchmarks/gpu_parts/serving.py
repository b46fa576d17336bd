"""The engine's own loop under load, in this process and on the wall clock, without a network."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_parts.bed import BLOCK, Bed
from gpu_parts.report import Report
from pla_serve.engine.build.engine import build_parts
from pla_serve.engine.build.sampling import Sampling
from pla_serve.engine.build.scheduling import Scheduling
from pla_serve.engine.build.warm_up import warm_up
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.kv.sizing import KVPlan
from pla_serve.engine.loop.loop import EngineLoop
from pla_serve.engine.requests.admission import RequestLimits
from pla_serve.engine.run.executor import BatchExecutor
from pla_serve.engine.sampling import Sampler
from pla_serve.policy.admission import Admission
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.protocol import Batch, BatchClass
from pla_serve.policy.registry import parse_policy
from pla_serve.wire.engine import AbortRequest, AddRequest, Inbound, Output, SamplingParams

IDS = itertools.count()


@dataclass
class Job:
    """One request and what became of it; times in seconds from the start of the run."""

    kind: str
    prompt: int
    outputs: int
    at: float
    id: str = field(default_factory=lambda: f"r{next(IDS)}")
    tokens: list[float] = field(default_factory=list)
    finished: float | None = None

    @property
    def ttft(self) -> float:
        return self.tokens[0] - self.at


class Observed:
    """A policy, and the seconds of the batches that it was told of, by class."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.seconds: dict[BatchClass, float] = dict.fromkeys(BatchClass, 0.0)
        self.batches: dict[BatchClass, int] = dict.fromkeys(BatchClass, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def observe(self, batch: Batch, seconds: float, now: float) -> None:
        self._count(batch, seconds)
        self._policy.observe(batch, seconds, now)

    def measured(self, batch: Batch, seconds: float, now: float) -> None:
        """The other way in which a policy hears of a batch: one that was dispatched ahead."""
        self._count(batch, seconds)
        self._policy.measured(batch, seconds, now)

    def _count(self, batch: Batch, seconds: float) -> None:
        self.seconds[batch.kind] += seconds
        self.batches[batch.kind] += 1


class Service:
    """A loop with a policy around a bed; KV and queues are fresh, the cost model is shared."""

    def __init__(
        self, bed: Bed, policy: str, config: PolicyConfig, *, graphs: bool = True, seed: int = 0
    ) -> None:
        self._vocabulary = int(bed.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        self._random = np.random.default_rng(seed)
        self._waiting: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._aborts: list[str] = []
        self.on_finish: Callable[[Job], None] = lambda job: None
        device = bed.device.torch_device
        self.executor: BatchExecutor = bed.executor(graphs)
        self.observed = Observed(parse_policy(policy).create(config, bed.cost))
        limits = RequestLimits(bed.context, self._vocabulary, frozenset(), 0)
        parts = build_parts(
            EngineConfig(block_tokens=BLOCK),
            KVPlan(bed.blocks, bed.blocks // 20, bed.context),
            self.executor,
            Sampling(limits, Sampler(self._vocabulary, device)),
            Scheduling(self.observed, bed.cost, Admission(10**9, None)),
        )
        self._kv = parts.kv
        self.loop = EngineLoop(parts, inbox=self._inbox, emit=self._emit, clock=time.monotonic)
        self._start = time.monotonic()

    def now(self) -> float:
        """Seconds since the start of the run."""
        return time.monotonic() - self._start

    def add(self, job: Job) -> None:
        """It will arrive at its time."""
        self._waiting.append(job)
        self._waiting.sort(key=lambda waiting: waiting.at)

    def abort(self, job_id: str) -> None:
        """As a client that goes away."""
        self._aborts.append(job_id)

    def run(
        self, jobs: Iterable[Job], seconds: float, until: Callable[[], bool] | None = None
    ) -> bool:
        """Serve until all is done or ``seconds`` are over; whether in time."""
        self._start = time.monotonic()
        for job in jobs:
            self._waiting.append(job)
        self._waiting.sort(key=lambda waiting: waiting.at)
        while self.now() < seconds:
            pause = self.loop.step()
            if pause is None or pause > 0:
                if pause is None and not self._waiting and not self._jobs and not self._aborts:
                    return True
                upcoming = self._waiting[0].at - self.now() if self._waiting else 0.001
                time.sleep(max(0.0, min(pause or 0.001, upcoming, 0.001)))
        return False

    def free_blocks(self) -> int:
        """KV blocks that no request holds."""
        return self._kv.available

    def drain(self) -> None:
        """Abort what is left."""
        self._aborts += list(self._jobs)
        self._waiting.clear()
        self.on_finish = lambda job: None
        while self.loop.step() is not None or self._aborts:
            pass

    def _inbox(self) -> list[Inbound]:
        now = self.now()
        messages: list[Inbound] = [AbortRequest(job_id) for job_id in self._aborts]
        for job_id in self._aborts:
            self._jobs.pop(job_id, None)
        self._aborts.clear()
        while self._waiting and self._waiting[0].at <= now:
            job = self._waiting.pop(0)
            self._jobs[job.id] = job
            prompt = self._random.integers(1, self._vocabulary, job.prompt).tolist()
            sampling = SamplingParams(max_tokens=job.outputs, temperature=0.0, ignore_eos=True)
            messages.append(
                AddRequest(
                    id=job.id, prompt=prompt, sampling=sampling, arrival=self._start + job.at
                )
            )
        return messages

    def _emit(self, message: object) -> None:
        if not isinstance(message, Output) or message.id not in self._jobs:
            return
        job = self._jobs[message.id]
        if message.error:
            raise RuntimeError(f"{job}: {message.error}")
        job.tokens += [self.now()] * len(message.tokens)
        if message.finish_reason is not None:
            job.finished = self.now()
            del self._jobs[job.id]
            self.on_finish(job)


def p(values: list[float], share: float) -> float:
    """A percentile; NaN of nothing."""
    return float(np.percentile(values, share)) if values else float("nan")


def teach(bed: Bed) -> None:
    """Let the cost model see what batches take, as the engine does at start."""
    executor = bed.executor()
    warm_up(
        lambda requests: executor.forward(requests, lambda: None),
        bed.cost,
        chunk=2048 if bed.context > 8192 else 64,
        longest=bed.context,
        blocks=bed.blocks,
        block_tokens=BLOCK,
        device=bed.device.torch_device,
        clock=time.perf_counter,
    )


def poisson(
    kind: str, rate: float, seconds: float, prompt: Callable[[], int], seed: int
) -> list[Job]:
    rng = random.Random(seed)
    jobs: list[Job] = []
    at = 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        jobs.append(Job(kind, prompt(), 1, at))
    return jobs


@dataclass(frozen=True)
class Scale:
    """How large the scenarios are."""

    long: int
    short: tuple[int, int]
    rate: float
    seconds: float
    streams: int
    stream_tokens: int
    stream_prompt: int
    second_long: int
    clients: tuple[int, ...]
    batch: int


FULL = Scale(32768, (32, 128), 20.0, 6.0, 8, 120, 512, 8192, (1, 4, 16, 64, 128), 8192)
TINY = Scale(1024, (4, 16), 20.0, 0.4, 2, 6, 16, 256, (1, 4), 256)


def preemption(report: Report, bed: Bed, scale: Scale) -> None:
    """Shorts beside a long prefill: what they wait, and what the long one pays for them."""
    rng = random.Random(1)

    def short() -> int:
        return rng.randint(*scale.short)

    config = PolicyConfig(max_batch_tokens=scale.batch)

    def serve(jobs: list[Job], policy: str = "length-aware") -> tuple[list[Job], Service]:
        service = Service(bed, policy, config)
        done: list[Job] = []
        service.on_finish = done.append
        if not service.run(jobs, min(60.0, report.left())):
            service.drain()
            report.check()
        return done, service

    serve([Job("long", scale.long, 1, 0.0), *poisson("short", 20, 0.3, short, 9)])  # warm
    alone = [serve([Job("long", scale.long, 1, 0.0)])[0][0].ttft for _ in range(2)]
    idle, _ = serve(poisson("short", scale.rate, scale.seconds, short, 2))
    idle_p99 = p([job.ttft for job in idle], 99)
    report.save("idle", {"p50": p([j.ttft for j in idle], 50), "p99": idle_p99, "n": len(idle)})
    report.save("long alone", alone)
    for policy in ("length-aware", "fcfs"):
        report.check()
        count = max(1, int(scale.seconds / min(alone)))
        longs = [Job("long", scale.long, 1, 0.0) for _ in range(count)]
        shorts = poisson("short", scale.rate, min(alone) * count * 0.95, short, 3)
        done, service = serve([*longs, *shorts], policy)
        waits = [job.ttft for job in done if job.kind == "short"]
        makespan = max(job.finished or 0.0 for job in done)
        inserted = service.observed.seconds[BatchClass.SHORT]
        slower = (makespan - min(alone) * count - inserted) / (min(alone) * count)
        report.save(
            policy,
            {
                "short_p50": p(waits, 50), "short_p99": p(waits, 99), "shorts": len(waits),
                "longs": count, "makespan": makespan, "inserted": inserted, "slowdown": slower,
                "batches": {kind.value: n for kind, n in service.observed.batches.items()},
            },
        )  # fmt: skip
        beside = p(waits, 99) / idle_p99
        target = policy == "length-aware"
        report.row(
            f"{bed.name}: shorts beside {scale.long}-token prefills, {policy}",
            f"P99 TTFT {p(waits, 99) * 1e3:.1f} ms = {beside:.2f} x idle ({idle_p99 * 1e3:.1f} ms)",
            "<= 2 x idle" if target else "",
            beside <= 2 if target else None,
        )
        report.row(
            f"{bed.name}: what the long ones pay beyond the inserted work, {policy}",
            f"{slower:+.1%}",
            "<= 3%" if target else "",
            slower <= 0.03 if target else None,
        )


def decode(report: Report, bed: Bed, scale: Scale) -> None:
    """Streams beside long prefills on one device, against first-come chunking of two sizes."""

    def streams() -> list[Job]:
        return [
            Job("stream", scale.stream_prompt, scale.stream_tokens, 0.0)
            for _ in range(scale.streams)
        ]

    def gaps(jobs: Iterable[Job]) -> list[float]:
        return [
            b - a for job in jobs if job.kind == "stream" for a, b in itertools.pairwise(job.tokens)
        ]

    def serve(policy: str, batch: int, longs: int) -> tuple[list[Job], float]:
        service = Service(bed, policy, PolicyConfig(max_batch_tokens=batch))
        jobs = streams()
        every = [*jobs, *(Job("long", scale.second_long, 1, 0.05) for _ in range(longs))]
        done: list[Job] = []
        service.on_finish = done.append
        if not service.run(every, min(60.0, report.left())):
            service.drain()
            report.check()
        return done, max(job.finished or 0.0 for job in done)

    serve("length-aware", scale.batch, 1)
    idle, seconds = serve("length-aware", scale.batch, 0)
    idle_p99 = p(gaps(idle), 99)
    report.save("streams alone", {"p99": idle_p99, "p50": p(gaps(idle), 50), "seconds": seconds})
    one = bed.cost.prefill_seconds(scale.second_long, 0)
    count = max(2, int(1.5 * seconds / one))
    best = 0.0
    found: dict[str, tuple[float, float]] = {}
    for policy, batch in (
        ("length-aware", scale.batch),
        ("fcfs", scale.batch),
        ("fcfs", scale.batch // 16),
    ):
        report.check()
        done, makespan = serve(policy, batch, count)
        tokens = sum(job.prompt + job.outputs for job in done)
        key = f"{policy} {batch}"
        found[key] = (p(gaps(done), 99) / idle_p99, tokens / makespan)
        best = max(best, tokens / makespan)
        report.save(
            key,
            {
                "p50": p(gaps(done), 50),
                "p99": p(gaps(done), 99),
                "tokens_per_second": tokens / makespan,
            },
        )
    for key, (ratio, rate) in found.items():
        target = key.startswith("length-aware")
        report.row(
            f"{bed.name}: streams beside {scale.second_long}-token prefills, {key}",
            f"P99 ITL {ratio:.1f} x alone, {rate:.0f} tokens/s = {rate / best:.3f} of the best",
            "<= 2 x and >= 0.97" if target else "",
            ratio <= 2 and rate >= 0.97 * best if target else None,
        )


SYSTEMS = (
    ("fcfs 8192", "fcfs", 8192, False),
    ("vLLM-like 2048/512", "fcfs:long_chunk_tokens=512", 2048, False),
    ("hrrn 1024, graphs", "hrrn", 1024, True),
    ("laps", "laps", 8192, True),
    ("length-aware", "length-aware", 8192, True),
    ("graphs only", "fcfs", 8192, True),
    ("preemption only", "length-aware", 8192, False),
)


def axes(report: Report, bed: Bed, scale: Scale, slo: float = 0.4) -> None:
    """The paper's axes: closed loops of clients, unique prompts of chat length, one token each."""
    rng = random.Random(5)
    seconds = 2.0 if scale is FULL else 0.15

    def prompt() -> int:
        """Lognormal, median 90 tokens, one in ten a document: an assumption, not a trace."""
        if rng.random() < 0.1:
            return min(scale.long // 4, int(rng.lognormvariate(7.6, 0.7)) + 1)
        return min(scale.long // 4, int(rng.lognormvariate(4.5, 1.0)) + 1)

    for clients in scale.clients:
        for label, policy, batch, graphs in SYSTEMS:
            report.check()
            config = PolicyConfig(max_batch_tokens=min(batch, scale.batch))
            service = Service(bed, policy, config, graphs=graphs)
            done: list[Job] = []

            def again(job: Job, service: Service = service, done: list[Job] = done) -> None:
                done.append(job)
                service.add(Job("chat", prompt(), 1, service.now()))

            service.on_finish = again
            service.run([Job("chat", prompt(), 1, 0.0) for _ in range(clients)], seconds)
            service.drain()
            waits = [job.ttft for job in done]
            late = sum(wait > slo for wait in waits) / max(1, len(waits))
            result = {
                "rps": len(done) / seconds,
                "tokens_per_second": sum(job.prompt for job in done) / seconds,
                "mean": float(np.mean(waits)) if waits else float("nan"),
                "p90": p(waits, 90),
                "violations": late,
            }
            report.save(f"{clients} clients, {label}", result)
            report.row(
                f"{bed.name}: {clients} clients, {label}",
                f"{result['rps']:.1f} req/s, {result['tokens_per_second']:.0f} tokens/s, mean "
                f"{result['mean'] * 1e3:.0f} ms, P90 {result['p90'] * 1e3:.0f} ms, "
                f"late {late:.1%}",
            )
