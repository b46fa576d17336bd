"""A step change of the mix: how fast a pool controller answers, and whether it then keeps still.

Short and long prompts arrive at random; their shares of the work are exchanged at once. Windows are
control periods, by arrival. A window is within the objective if no more than a tenth of its first
tokens are late, beyond chance; a fleet is back in the first window from which on all are. Moves are
counted from there to the end, and as the steady state's before the step.

    python benchmarks/fleet_control.py simulated -o benchmarks/results/fleet_control.json
    python benchmarks/fleet_control.py real -o benchmarks/results/fleet_control_real.json
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from pla_serve.environment import describe
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.pools.protocol import PoolController
from pla_serve.policy.pools.registry import parse_controller
from pla_serve.policy.registry import parse_policy
from pla_serve.simulator.cluster import Cluster
from pla_serve.simulator.cluster_options import ClusterOptions, ClusterResult, SimulatedTraffic
from pla_serve.simulator.machine import KnownCost, load_machine
from pla_serve.simulator.turns import OpenLoop, SimulatedTurn

SHORT_TOKENS = (32, 256)
LONG_TOKENS = (2048, 8192)
BOUNDARY = 256
LATE_SHARE = 0.1
SLO_SECONDS, SLO_STRETCH = 0.4, 5.0
"""A first token is late after 0.4 s and five times its time alone, as in the simulator."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("where", choices=("simulated", "real"))
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs = simulated(options.seeds) if options.where == "simulated" else asyncio.run(real())
    content = {"kind": options.where, "environment": describe(), "runs": runs}
    text = json.dumps(content, indent=1)
    print(text if options.where == "real" else _brief(runs))
    if options.output is not None:
        options.output.write_text(text + "\n")


# Simulated


def simulated(seeds: int) -> list[dict[str, Any]]:
    """All controllers on 8 instances, with pools that are strict (as published) and that overflow,
    and on 100, where they are strict."""
    strict, overflow = "class-pools:overflow_seconds=inf", "class-pools"
    return [
        simulate(instances, controller, routing, seed)
        for instances, routing, count in (
            (8, strict, seeds),
            (8, overflow, seeds),
            (100, strict, 1),
        )
        for controller in ("off", "pressure", "balance")
        for seed in range(count)
    ]


def simulate(instances: int, controller: str, routing: str, seed: int) -> dict[str, Any]:
    """One run of 50 periods, the step after 20."""
    period, load = (2.0 if instances < 50 else 1.0), 0.8
    machine = load_machine("h200-qwen2.5-32b")
    cost = KnownCost(machine.profile)
    before, after = 0.2, 0.9
    step, end = 20 * period, 50 * period
    turns = [
        *_arrivals(seed, cost, 0.0, step, load * instances, before),
        *_arrivals(seed + 1000, cost, step, end, load * instances, after),
    ]
    for index, turn in enumerate(turns):
        turn.index = index
    spec = parse_policy("length-aware")
    config = PolicyConfig(max_batch_tokens=machine.max_batch_tokens, layers=machine.layers)
    options = ClusterOptions(
        instances=instances,
        short_instances=max(1, round(before * instances)),
        routing=routing,
        boundary_tokens=BOUNDARY,
        control_seconds=period,
    )
    made: PoolController | None = None if controller == "off" else parse_controller(controller)
    result = Cluster(
        options,
        machine,
        lambda: spec.create(config, cost),
        SimulatedTraffic(turns, OpenLoop(turns, wait=False)),
        controller=made,
    ).run()
    lateness = [_late(job.ttft, cost.prefill_seconds(job.new_tokens, 0)) for job in result.jobs]
    return {
        "instances": instances,
        "controller": controller,
        "routing": routing,
        "seed": seed,
        "period_s": period,
        "load": load,
        "short_share": [before, after],
        **judge(
            _times(turns),
            lateness,
            [(at, move.target.value) for at, move in result.moves],
            step,
            end,
            period,
        ),
        "short_p90_ttft_s": _p90(result, step),
    }


def _arrivals(
    seed: int, cost: KnownCost, start: float, end: float, work: float, share: float
) -> list[SimulatedTurn]:
    """Poisson arrivals of ``work`` seconds of prefill a second, ``share`` of it short."""
    random = Random(seed)
    found: list[SimulatedTurn] = []
    for part, (least, most) in ((share, SHORT_TOKENS), (1 - share, LONG_TOKENS)):
        mean = float(np.mean([cost.prefill_seconds(n, 0) for n in range(least, most + 1, 8)]))
        now = start
        while True:
            now += random.expovariate(work * part / mean)
            if now >= end:
                break
            found.append(SimulatedTurn(0, now, random.randint(least, most), 1, (), history=0))
    return sorted(found, key=lambda turn: turn.time)


def _times(turns: Sequence[SimulatedTurn]) -> list[float]:
    return [turn.time for turn in turns]


def _late(ttft: float, alone: float) -> bool:
    return ttft > max(SLO_SECONDS, SLO_STRETCH * alone)


def _p90(result: ClusterResult, step: float) -> list[float]:
    """Of short requests that arrived before the step, and after it."""
    parts: list[list[float]] = [[], []]
    for job in result.jobs:
        if job.new_tokens <= BOUNDARY:
            parts[job.arrival >= step].append(job.ttft)
    return [round(float(np.percentile(part, 90)), 4) for part in parts]


# Both


def judge(
    times: Sequence[float],
    late: Sequence[bool],
    moves: Sequence[tuple[float, str]],
    step: float,
    end: float,
    period: float,
) -> dict[str, Any]:
    """How long it took, and what moved when: times of moves, and into which pool."""
    windows = [
        np.array([bad for t, bad in zip(times, late, strict=True) if at <= t < at + period])
        for at in np.arange(0.0, end - period / 2, period)
    ]
    shares = [float(window.mean()) if len(window) else 0.0 for window in windows]
    first = round(step / period)
    # What a window may have by chance: three standard deviations.
    allowed = [
        LATE_SHARE + 3 * float(np.sqrt(LATE_SHARE * (1 - LATE_SHARE) / max(1, len(window))))
        for window in windows
    ]
    over = [share > most for share, most in zip(shares, allowed, strict=True)]
    bad = [i for i in range(first, len(windows)) if over[i]]
    back = (bad[-1] - first + 1) if bad else 0
    settled = step + max(back, 2) * period
    return {
        "late_share": [round(share, 4) for share in shares],
        # The first third is warm-up.
        "within_slo_before_step": not any(over[first // 3 : first]),
        "periods_until_within_slo": back,
        "moves_before_step": sum(t < step for t, _ in moves),
        "moves_of_answer": sum(step <= t <= settled for t, _ in moves),
        "moves_afterwards": sum(t > settled for t, _ in moves),
        # Two in a row, both ways.
        "swings_afterwards": sum(
            to != before
            for (_, before), (_, to) in itertools.pairwise(m for m in moves if m[0] > settled)
        ),
    }


def _brief(runs: Sequence[dict[str, Any]]) -> str:
    names = (
        *("instances", "routing", "controller", "seed"),
        *("within_slo_before_step", "periods_until_within_slo"),
        *("moves_before_step", "moves_of_answer", "moves_afterwards", "swings_afterwards"),
    )
    rows = ["  ".join(str(run[name]) for name in names) for run in runs]
    return "\n".join(["  ".join(names), *rows])


# Real


async def real() -> list[dict[str, Any]]:
    """Four processes with a small model. Without a controller it is to be seen whether the answer
    mattered."""
    from control_trial import Costs, Trial

    with tempfile.TemporaryDirectory() as folder:
        costs = await Costs.measure(Path(folder))
    found = []
    for controller in ("off", "pressure", "balance"):
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(controller, costs, Path(folder))
            began = time.monotonic()
            outcome = await trial.run()
        judged = judge(
            outcome.times, outcome.late, outcome.moves, outcome.step, outcome.end, outcome.period
        )
        found.append({**outcome.facts, **judged, "seconds": round(time.monotonic() - began, 1)})
    return found


if __name__ == "__main__":
    main()
