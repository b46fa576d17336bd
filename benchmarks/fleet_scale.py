"""How long a simulated fleet of a thousand instances takes, and what one routing decision costs.

One process, one core, wall clock; the workload is generated first and timed apart. Requests are
chat as in LMSYS-Chat-1M with a tenth documents, sessions of two turns in the mean, each instance
with a finite prefix cache, at 80% load. The router is the one of real fleets, with its records of
prefixes, reports, circuits and accounts. Every decision of it is timed, the clock's own time not
taken off.

    python benchmarks/fleet_scale.py -o benchmarks/results/fleet_scale.json
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np

from pla_serve.environment import describe
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.registry import parse_policy
from pla_serve.simulator.cluster import Cluster
from pla_serve.simulator.cluster_options import ClusterOptions, SimulatedTraffic, Stopwatch
from pla_serve.simulator.machine import KnownCost, load_machine
from pla_serve.simulator.turns import OpenLoop, turns_of
from pla_serve.simulator.workload import at_load
from pla_serve.traces.generator import KINDS, GeneratorOptions, generate_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--workload", choices=KINDS, default="chat+documents")
    parser.add_argument("--routing", default="predicted")
    parser.add_argument("--policy", default="length-aware")
    parser.add_argument("--machine", default="h200-qwen2.5-32b")
    parser.add_argument("--no-decision-times", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    began = time.perf_counter()
    machine = load_machine(options.machine)
    made = GeneratorOptions(requests=options.requests, rate=1000, document=2048)
    rows = generate_rows(options.workload, made, options.seed)
    cost = KnownCost(machine.profile)
    work = at_load("", rows, cost, options.load, instances=options.instances)
    turns = turns_of(work.rows, work.stretch)
    generated = time.perf_counter() - began

    spec = parse_policy(options.policy)
    config = PolicyConfig(max_batch_tokens=machine.max_batch_tokens)
    fleet = ClusterOptions(
        instances=options.instances,
        routing=options.routing,
        express=spec.create(config, cost).capabilities.leaves_at_layer_boundary,
        cache_tokens=machine.kv_tokens,
    )
    began = time.perf_counter()
    decisions: list[float] = []
    timed = not options.no_decision_times
    stopwatch = Stopwatch(time.perf_counter, decisions.append) if timed else None
    cluster = Cluster(
        fleet,
        machine,
        lambda: spec.create(config, cost),
        SimulatedTraffic(turns, OpenLoop(turns, wait=False)),
        stopwatch=stopwatch,
    )
    processor = time.process_time()
    result = cluster.run()
    processor = time.process_time() - processor
    simulated = time.perf_counter() - began

    shorts = np.array([job.ttft for job in result.jobs if job.new_tokens <= 256])
    found: dict[str, Any] = {
        "kind": "wall clock of a simulation",
        "instances": options.instances,
        "requests": len(turns),
        "workload": options.workload,
        "load": options.load,
        "routing": options.routing,
        "policy": options.policy,
        "seed": options.seed,
        "generate_s": round(generated, 2),
        "simulate_s": round(simulated, 2),
        "simulate_cpu_s": round(processor, 2),
        "requests_per_wall_s": round(len(turns) / simulated),
        "batches": sum(node.batches for node in result.nodes.values()),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "virtual_s": round(result.end, 1),
        "cached_share": round(result.cached_tokens / sum(t.prompt_tokens for t in turns), 4),
        "short_ttft_p99_s": round(float(np.percentile(shorts, 99)), 4),
        "short_over_0.4_s": float((shorts > 0.4).mean()),
    }
    if not options.no_decision_times:
        times = 1e6 * np.array(decisions)
        found["decision_us"] = {
            "mean": round(float(times.mean()), 2),
            "p50": round(float(np.percentile(times, 50)), 2),
            "p99": round(float(np.percentile(times, 99)), 2),
        }
    text = json.dumps({**found, "environment": describe()}, indent=1)
    print(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
