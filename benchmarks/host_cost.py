"""What a decode step costs the host: the engine's loop, all of it but the model's pass.

The KV cache is full of what finished requests have left, scattered, as after hours of serving, so
each block that a sequence needs is an evicted one. The executor lays the batch out and copies it,
and computes nothing; the logits of all rows are the same. On an accelerator this is the time that
has to hide behind the device's.

    python benchmarks/host_cost.py -o benchmarks/results/host_cost.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import DirectUploader, stage
from pla_serve.engine.build.engine import build_parts
from pla_serve.engine.build.sampling import Sampling
from pla_serve.engine.build.scheduling import build_scheduling
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.device.marks import HostDevice
from pla_serve.engine.kv.manager import BlockTable, KVManager
from pla_serve.engine.kv.sizing import KVPlan
from pla_serve.engine.loop.loop import EngineLoop
from pla_serve.engine.requests.admission import RequestLimits
from pla_serve.engine.run.executor import Executed
from pla_serve.engine.run.runner import AtBoundary
from pla_serve.engine.sampling import Sampler
from pla_serve.environment import describe
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.wire.engine import AddRequest, Inbound, Outbound, SamplingParams

VOCABULARY = 1000
BLOCKS = 40_000
"""Of 16 tokens: what a 7B model has on a GPU of 80 GB."""
STEPS = 400
PARTS = ("loop", "layout")


class Packing:
    """The executor: it lays batches out, and counts the time apart."""

    carries = False

    def __init__(self, block_tokens: int) -> None:
        self.device = HostDevice()
        self.layout_seconds = 0.0
        self.rows = 0
        self._block_tokens = block_tokens
        self._logits = torch.zeros(1, VOCABULARY)
        self._logits[0, 1] = 1.0

    def forward(
        self,
        requests: Sequence[SpanRequest],
        at_boundary: AtBoundary,
        carried: torch.Tensor | None = None,
    ) -> Executed:
        """See `Executor`."""
        at_boundary()
        began = time.perf_counter()
        stage(requests, self._block_tokens, DirectUploader())
        self.layout_seconds += time.perf_counter() - began
        self.rows = sum(request.wants_logits for request in requests)
        return Executed(self._logits.expand(self.rows, -1), False)

    def end_warm_up(self) -> None:
        """See `Executor`."""

    def use_idle_time(self) -> bool:
        """See `Executor`."""
        return False

    def counts(self) -> None:
        """See `Executor`."""


def scatter(kv: KVManager, rng: Random) -> None:
    """Fill the cache with finished sequences whose blocks lie among each other."""
    live: list[tuple[list[int], BlockTable]] = []
    while kv.available > kv.blocks // 50:
        tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(20, 1500))]
        table = BlockTable()
        if kv.reserve(tokens, table) is None:
            break
        live.append((tokens, table))
        for grown, own in rng.sample(live, min(len(live), 8)):
            more = len(grown) + rng.randint(1, 40)
            if kv.grow(own, more):
                grown += [rng.randrange(VOCABULARY) for _ in range(more - len(grown))]
    rng.shuffle(live)
    for tokens, table in live:
        kv.remember(tokens, len(tokens), table)
        kv.release(table)


def measure(batch: int, context: int, *, full: bool) -> dict[str, Any]:
    """Return median and P99 milliseconds of a decode step of ``batch`` sequences."""
    rng = Random(0)
    config = EngineConfig(
        model="none", policy_config=PolicyConfig(max_batch_requests=batch), max_queued_tokens=10**9
    )
    plan = KVPlan(BLOCKS, 0, 32_768)
    limits = RequestLimits(plan.max_model_len, VOCABULARY, frozenset(), 0)
    executor = Packing(config.block_tokens)
    cost = CostModel(CostProfile(1e-5, 1e-11, 1e-9, 1e-6, 1e-2))
    parts = build_parts(
        config,
        plan,
        executor,
        Sampling(limits, Sampler(VOCABULARY, torch.device("cpu"))),
        build_scheduling(config, cost, layers=32, kv_tokens=plan.blocks * config.block_tokens),
    )
    if full:
        scatter(parts.kv, rng)
    numbers = count()
    inbox: list[Inbound] = []

    def add() -> None:
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(context // 2, context))]
        sampling = SamplingParams(max_tokens=10_000, temperature=0.0, ignore_eos=True)
        inbox.append(
            AddRequest(
                id=str(next(numbers)), prompt=prompt, sampling=sampling, arrival=time.monotonic()
            )
        )

    def take() -> list[Inbound]:
        messages, inbox[:] = list(inbox), []
        return messages

    sent: list[Outbound] = []
    loop = EngineLoop(parts, inbox=take, emit=sent.append, clock=time.monotonic)
    for _ in range(batch):
        add()
    for _ in range(100 * batch):
        loop.step()
        sent.clear()
        if executor.rows == batch:
            break
    else:
        raise RuntimeError(f"{batch} sequences never decoded together")
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    while len(times["loop"]) < STEPS:
        executor.layout_seconds = 0.0
        began = time.perf_counter()
        loop.step()
        took = time.perf_counter() - began
        sent.clear()
        if executor.rows == batch:
            times["loop"].append(took - executor.layout_seconds)
            times["layout"].append(executor.layout_seconds)
    whole = sorted(map(sum, zip(*times.values(), strict=True)))
    return {
        "batch": batch,
        "context": context,
        "cache": "full, scattered" if full else "empty",
        "step_ms_p50": round(median(whole) * 1e3, 3),
        "step_ms_p99": round(whole[int(0.99 * len(whole))] * 1e3, 3),
        **{f"{part}_ms_p50": round(median(times[part]) * 1e3, 3) for part in PARTS},
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--context", type=int, default=2000, help="tokens of a sequence, at most")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for batch in arguments.batch:
        for full in (False, True):
            rows.append(measure(batch, arguments.context, full=full))
            print(json.dumps(rows[-1]), flush=True)
    if arguments.output is not None:
        record = {"environment": describe(), "blocks": BLOCKS, "steps": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
