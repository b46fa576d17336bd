"""Fig. 6: requests a second, mean and P90 latency against the number of clients.

Closed loop on one and on eight H200 with Qwen2.5-32B: full, graphs only, disaggregation only.
Latency is the time to first token; a client sends its next request with the answer's first token,
as if prefill were all there is. Chat as in LMSYS-Chat-1M (`traces/generator.py`), two turns a
session in the mean. Eight instances keep as much KV as fits, so that routing matters; one is taken
to keep all.

What captured shapes gain depends on the host (`simulator/captured.py`): --host sets how long it
takes to launch the ordinary kernels of a pass.

    python benchmarks/paper/fig6.py -o benchmarks/results/paper/fig6
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from common import (
    LEAN_HOST,
    SLOW_HOST,
    STRICT_POOLS,
    Clients,
    Runs,
    System,
    figure,
    finish,
    machine,
    main,
    ordinary,
    our_ladder,
    published_grid,
    run,
    seconds_axis,
    summary,
    ticks,
    turns_with_history,
)

from pla_serve.policy.pools.pressure import PressureController
from pla_serve.simulator.turns import turns_of
from pla_serve.traces.generator import GeneratorOptions, generate_rows

CLIENTS = {1: (1, 2, 4, 8, 16, 32, 64), 8: (1, 4, 8, 16, 32, 64, 128, 256, 512)}
HOSTS = {"slow host": SLOW_HOST, "lean host": LEAN_HOST}
LAPS = "laps:classify=uncached:window_seconds=0"


def systems(host: float, instances: int) -> list[System]:
    """The published ones are spread over pools of short and long instances, as published."""
    pools: dict[str, Any] = {}
    if instances > 1:
        pools = {"routing": STRICT_POOLS, "short_instances": instances // 2}
        pools["controller"] = PressureController
    one = instances == 1
    fcfs, hrrn = ("fcfs", "hrrn") if one else ("fcfs, round robin", "hrrn, cache-aware")
    route = "round-robin" if one else "cache-aware"
    return [
        System(fcfs, "fcfs", "#8a8a8a", ordinary(host), style="--"),
        System(hrrn, "hrrn", "#d0a000", ordinary(host), route, "--"),
        System("graphs only", "fcfs", "#8c5fa8", published_grid(host)),
        System("disaggregation only", LAPS, "#e39a6b", ordinary(host), **pools),
        System("published, full", "pla-serve", "#c2571a", published_grid(host), **pools),
        System("ours", "length-aware", "#0f6b8f", our_ladder(host), "predicted"),
    ]


def simulate(options: Namespace) -> tuple[dict[str, Any], Runs]:
    chip = machine("32b")
    runs: Runs = []
    for instances, clients in CLIENTS.items():
        count = round((4000 if instances == 1 else 12_000) * options.scale)
        rows = generate_rows("chat", GeneratorOptions(requests=count), options.seed)
        for name, host in HOSTS.items():
            for system in systems(host, instances):
                for many in clients:
                    some = rows[: max(400, min(count, 200 * many))]
                    apart = instances > 1
                    turns = turns_of(some) if apart else turns_with_history(some)
                    extra = {"instances": 8, "cache_tokens": chip.kv_tokens} if apart else {}
                    result = run(system, chip, turns, Clients([(turns, many)]), **extra)
                    about = {"instances": instances, "host": name, "system": system.label}
                    runs.append({**about, "clients": many, **summary(result.jobs)})
    about = {"machine": chip.name, "host_seconds": HOSTS}
    return about, runs


def draw(options: Namespace, runs: Runs) -> None:
    picture, axes = figure(2, 3, 12, 6.4)
    for row, instances in zip(axes, CLIENTS, strict=True):
        for place, (name, read) in zip(row, PANELS.items(), strict=True):
            for system in systems(SLOW_HOST, instances):
                found = [
                    found
                    for found in runs
                    if found["instances"] == instances
                    and found["host"] == "slow host"
                    and found["system"] == system.label
                ]
                place.plot(
                    [one["clients"] for one in found],
                    [read(one) for one in found],
                    f"o{system.style}",
                    color=system.color,
                    label=system.label,
                )
            ticks(place, CLIENTS[instances], "clients")
            seconds_axis(place)
            place.set_title(f"{instances} x H200: {name}")
    title = f"Qwen2.5-32B, closed loop, chat; {SLOW_HOST * 1e3:g} ms of host time a pass."
    finish(options, picture, axes[1][0], title, 6)


PANELS = {
    "requests a second": lambda found: found["requests_per_s"],
    "mean TTFT, s": lambda found: found["all"]["mean"],
    "P90 TTFT, s": lambda found: found["all"]["p90"],
}


if __name__ == "__main__":
    main(__doc__, "fig6", simulate, draw)
