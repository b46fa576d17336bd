"""Fig. 7: share of requests over a TTFT of 0.4 s, Poisson arrivals, one and eight H200.

Qwen2.5-32B; chat as in LMSYS-Chat-1M, and one request in ten is a document (lognormal, median 2,048
tokens: one in five alone takes more than 0.4 s). Eight instances keep as much KV as fits, one is
taken to keep all. Every batch launches as if captured, and none is padded.

    python benchmarks/paper/fig7.py -o benchmarks/results/paper/fig7
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from common import (
    STRICT_POOLS,
    Runs,
    System,
    figure,
    finish,
    machine,
    main,
    open_loop,
    run,
    summary,
)

from pla_serve.policy.pools.pressure import PressureController
from pla_serve.traces.generator import GeneratorOptions, generate_rows

LOADS = (0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)


def systems(instances: int) -> list[System]:
    pools: dict[str, Any] = {}
    if instances > 1:
        pools = {"routing": STRICT_POOLS, "short_instances": instances // 2}
        pools["controller"] = PressureController
    return [
        System("data parallel: fcfs, round robin", "fcfs", "#8a8a8a"),
        System("SGLang with router: hrrn, cache-aware", "hrrn", "#d0a000", routing="cache-aware"),
        System("published: AWD, pools, pressure", "pla-serve", "#c2571a", **pools),
        System("ours: length-aware, predicted", "length-aware", "#0f6b8f", routing="predicted"),
    ]


def simulate(options: Namespace) -> tuple[dict[str, Any], Runs]:
    chip = machine("32b")
    runs: Runs = []
    for instances in (1, 8):
        count = round((6000 if instances == 1 else 20_000) * options.scale)
        made = GeneratorOptions(requests=count, document=2048, document_sigma=0.8)
        rows = generate_rows("chat+documents", made, options.seed)
        extra = {"instances": instances, "cache_tokens": chip.kv_tokens if instances > 1 else 0}
        for load in LOADS:
            for system in systems(instances):
                turns, source, rate = open_loop(rows, chip, load, instances)
                result = run(system, chip, turns, source, **extra)
                about = {"instances": instances, "system": system.label, "load": load}
                about |= {"offered_requests_per_s": rate, "pool_moves": len(result.moves)}
                runs.append({**about, **summary(result.jobs)})
    return {"machine": chip.name}, runs


def draw(options: Namespace, runs: Runs) -> None:
    picture, axes = figure(2, 2, 9.5, 6.4)
    for row, instances in zip(axes, (1, 8), strict=True):
        for place, name in zip(row, ("all", "short"), strict=True):
            for system in systems(instances):
                found = [
                    one
                    for one in runs
                    if one["system"] == system.label and one["instances"] == instances
                ]
                place.plot(
                    [one["offered_requests_per_s"] for one in found],
                    [100 * one[name]["over_slo"] for one in found],
                    "o-",
                    color=system.color,
                    label=system.label,
                )
            what = "all requests" if name == "all" else "up to 256 new tokens"
            place.set_title(f"{instances} x H200: % over 0.4 s, {what}")
            place.set_xlabel("requests a second, Poisson")
            place.set_ylim(-2, 100)
    finish(options, picture, axes[0][0], "Qwen2.5-32B, chat with a tenth documents.", 2)


if __name__ == "__main__":
    main(__doc__, "fig7", simulate, draw)
