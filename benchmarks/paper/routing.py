"""Eight instances: late short requests and requests a second, by router.

Not a figure of the publication, but the question behind its Fig. 6 and 7. Eight H200 with
Qwen2.5-32B, each with a finite prefix cache. Open loop: chat with a tenth documents, Poisson, and
the same with documents in bursts of ten times their rate. Closed loop: 256 clients without pauses.

    python benchmarks/paper/routing.py -o benchmarks/results/paper/routing
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from common import (
    Clients,
    Runs,
    System,
    figure,
    finish,
    machine,
    main,
    open_loop,
    run,
    seconds_axis,
    summary,
)

from pla_serve.policy.pools.balance import BalanceController
from pla_serve.policy.pools.pressure import PressureController
from pla_serve.simulator.turns import turns_of
from pla_serve.traces.generator import GeneratedKind, GeneratorOptions, generate_rows

INSTANCES = 8
CLIENTS = 256
LOADS = (0.6, 0.8, 0.9, 1.0, 1.1, 1.2)
WORKLOADS: tuple[GeneratedKind, ...] = ("chat+documents", "burst-long")
POOLS: dict[str, Any] = {"routing": "class-pools", "short_instances": 4}
LATE = 0.01
SYSTEMS = (
    System("fcfs, round robin", "fcfs", "#bbbbbb", routing="round-robin", style="--"),
    System("fcfs, cache-aware", "fcfs", "#777777", routing="cache-aware", style="--"),
    System("fcfs, predicted", "fcfs", "#333333", routing="predicted", style="--"),
    System("round robin", "length-aware", "#d0a000", routing="round-robin"),
    System("least loaded", "length-aware", "#8c5fa8", routing="least-loaded"),
    System("cache-aware", "length-aware", "#3a9a5b", routing="cache-aware"),
    System("class pools", "length-aware", "#e39a6b", **POOLS),
    System(
        "class pools, pressure", "length-aware", "#c2571a", controller=PressureController, **POOLS
    ),
    System(
        "class pools, balance", "length-aware", "#8c2f0b", controller=BalanceController, **POOLS
    ),
    System("predicted", "length-aware", "#0f6b8f", routing="predicted"),
)


def simulate(options: Namespace) -> tuple[dict[str, Any], Runs]:
    chip = machine("32b")
    extra = {"instances": INSTANCES, "cache_tokens": chip.kv_tokens}
    count = round(8000 * options.scale)
    runs: Runs = []
    for kind in WORKLOADS:
        made = GeneratorOptions(requests=count, rate=100, document=2048, quiet=30.0, burst=5.0)
        rows = generate_rows(kind, made, options.seed)
        for system in SYSTEMS:
            for load in LOADS:
                turns, source, rate = open_loop(rows, chip, load, INSTANCES)
                result = run(system, chip, turns, source, **extra)
                about = {"workload": kind, "system": system.label, "load": load}
                about |= {"offered_requests_per_s": rate, "pool_moves": len(result.moves)}
                runs.append({**about, **summary(result.jobs)})
        if kind == "chat+documents":
            for system in SYSTEMS:
                turns = turns_of(rows)
                result = run(system, chip, turns, Clients([(turns, CLIENTS)]), **extra)
                about = {"workload": "closed", "system": system.label, "clients": CLIENTS}
                about |= {"pool_moves": len(result.moves)}
                runs.append({**about, **summary(result.jobs)})
    return {"machine": chip.name, "instances": INSTANCES}, runs


def draw(options: Namespace, runs: Runs) -> None:
    picture, axes = figure(2, 2, 11, 7.4)
    for row, kind in zip(axes, WORKLOADS, strict=True):
        for place, name in zip(row, ("% of shorts over 0.4 s", "mean TTFT of all, s"), strict=True):
            for system in SYSTEMS:
                found = [
                    one for one in runs if one["system"] == system.label and one["workload"] == kind
                ]
                late = name.startswith("%")
                values = [
                    100 * one["short"]["over_slo"] if late else one["all"]["mean"] for one in found
                ]
                place.plot(
                    [one["offered_requests_per_s"] for one in found],
                    values,
                    f"o{system.style}",
                    color=system.color,
                    label=system.label,
                )
            if name.startswith("%"):
                place.set_yscale("symlog", linthresh=1)
                place.set_yticks([0, 1, 10, 100], ["0", "1", "10", "100"])
                place.set_ylim(-0.1, 110)
            else:
                seconds_axis(place)
            place.set_title(f"{kind}: {name}")
            place.set_xlabel("requests a second")
    title = "Eight H200, Qwen2.5-32B. Dashed: fcfs on the instances, else length-aware."
    finish(options, picture, axes[0][0], title, 5)


if __name__ == "__main__":
    main(__doc__, "routing", simulate, draw)
