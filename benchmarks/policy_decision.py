"""How long each call into a policy takes while many requests are queued.

Serving runs on a virtual clock: batches take what the cost model predicts, give or take a tenth;
whatever finishes is replaced, so the queue stays full. Every call is timed by itself, garbage
collection included. "decision" is `next` and `at_layer_boundary` together, as an engine asks them.

    python benchmarks/policy_decision.py --queued 10000 --json result.json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pla_serve.environment import describe
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, BatchClass, PrefillRequest, Run
from pla_serve.policy.registry import POLICIES, create_policy

DECISIONS = ("next", "at_layer_boundary")
DECODING = 64
LAYERS = 30
"""Of the model: so often is a running batch asked about."""


CLOCKS = {"wall": time.perf_counter_ns, "cpu": time.thread_time_ns}


class Stopwatch:
    """Collects the nanoseconds of every call by name."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self.times: defaultdict[str, list[int]] = defaultdict(list)

    def __call__(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        start = self._clock()
        result = call(*args)
        self.times[name].append(self._clock() - start)
        return result

    def microseconds(self) -> dict[str, dict[str, float]]:
        """P50, P99 and maximum by name."""
        report: dict[str, dict[str, float]] = {}
        decisions = [took for name in DECISIONS for took in self.times[name]]
        for name, times in {"decision": decisions, **self.times}.items():
            ordered = sorted(times)
            report[name] = {
                "calls": len(ordered),
                "p50_us": ordered[len(ordered) // 2] / 1e3,
                "p99_us": ordered[int(len(ordered) * 0.99)] / 1e3,
                "max_us": ordered[-1] / 1e3,
            }
        return report


class Load:
    """Serves a policy whose queue is kept full; chat turns with one document in ten."""

    def __init__(self, name: str, queued: int, seed: int, watch: Stopwatch) -> None:
        self._random = random.Random(seed)
        self._cost = CostModel()
        self._policy = create_policy(name, PolicyConfig(), self._cost)
        self._ids = (f"request-{number}" for number in count())
        self._steps_left: dict[str, int] = {}
        self._waiting: dict[str, None] = {}
        self._now = 0.0
        self.watch = watch
        for _ in range(queued):
            self._now += 0.01
            self._policy.add(self._request(), self._now)

    def rounds(self, number: int) -> None:
        """Take ``number`` decisions for a free device, and those that come up inside."""
        for round_number in range(number):
            decision = self.watch("next", self._policy.next, self._now)
            assert isinstance(decision, Run)
            self._execute(decision.batch, interruptible=True)
            self.watch("predicted_wait", self._policy.predicted_wait, 100, 0, self._now)
            self.watch("state", self._policy.state, self._now)
            if round_number % 8 == 0:
                aborted = next(iter(self._waiting))
                del self._waiting[aborted]
                self.watch("remove", self._policy.remove, aborted)
                self._add()

    def _execute(self, batch: Batch, interruptible: bool) -> None:
        policy, watch = self._policy, self.watch
        if interruptible:
            for _ in range(LAYERS):
                self._now += 0.01
                inner = watch("at_layer_boundary", policy.at_layer_boundary, self._now, batch)
                if inner is not None:
                    self._execute(inner, interruptible=False)
                if batch.kind is not BatchClass.LONG:
                    break
        seconds = self._cost.seconds(batch) * self._random.uniform(0.9, 1.1)
        self._now += seconds
        watch("observe", policy.observe, batch, seconds, self._now)
        for chunk in batch.prefills:
            if chunk.completes:
                self._completed(chunk.request_id, chunk.history + chunk.tokens)
        for chunk in batch.decodes:
            self._steps_left[chunk.request_id] -= 1
            if self._steps_left[chunk.request_id] == 0:
                del self._steps_left[chunk.request_id]
                policy.remove(chunk.request_id)

    def _completed(self, request_id: str, context: int) -> None:
        self._waiting.pop(request_id)
        if len(self._steps_left) < DECODING:
            self._steps_left[request_id] = 1 + int(self._random.expovariate(1 / 50))
            args = (request_id, context, self._now, self._now)
            self.watch("start_decode", self._policy.start_decode, *args)
        self._add()

    def _add(self) -> None:
        self.watch("add", self._policy.add, self._request(), self._now)

    def _request(self) -> PrefillRequest:
        draw = self._random
        document = draw.random() < 0.1
        tokens = draw.randint(2000, 4000) if document else 1 + int(draw.lognormvariate(4, 1))
        history = 0 if document else draw.choice((0, draw.randint(0, 4000)))
        deadline = self._now + 1 if draw.random() < 0.2 else None
        request_id = next(self._ids)
        self._waiting[request_id] = None
        return PrefillRequest(request_id, self._now, tokens, history, deadline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--queued", type=int, default=10_000, help="requests kept waiting")
    parser.add_argument("--rounds", type=int, default=3_000, help="decisions for each policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--clock",
        choices=tuple(CLOCKS),
        default="wall",
        help="cpu leaves out what other processes take",
    )
    parser.add_argument("--json", type=Path, help="write the figures here, with the machine's")
    args = parser.parse_args()

    results = {}
    table = Table("policy", "call", "calls", "P50 µs", "P99 µs", "max µs")
    for name in POLICIES:
        load = Load(name, args.queued, args.seed, Stopwatch(CLOCKS[args.clock]))
        load.rounds(args.rounds)
        results[name] = load.watch.microseconds()
        for call, row in results[name].items():
            figures = [f"{row[key]:.1f}" for key in ("p50_us", "p99_us", "max_us")]
            table.add_row(name, call, str(row["calls"]), *figures)
        table.add_section()
    Console().print(table)
    if args.json is not None:
        report: dict[str, object] = {
            "environment": describe(),
            "clock": args.clock,
            "queued": args.queued,
        }
        report["microseconds"] = results
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
