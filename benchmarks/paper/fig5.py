"""Fig. 5: mean latency and throughput against the waiting window of the shorts.

64 clients in a closed loop on one H200 with Qwen2.5-14B; latency is the time to first token.

- messages: sizes of LMSYS-Chat-1M up to 256 tokens, single turns. Between answer and next request
  lies a tenth of a second on average, so that the device is nearly saturated.
- chat: the same with its 5% of longer messages (up to 2,048) and with later turns; 0.2 s.

    python benchmarks/paper/fig5.py -o benchmarks/results/paper/fig5
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
    run,
    summary,
    turns_with_history,
)

from pla_serve.traces.generator import GeneratedKind, GeneratorOptions, generate_rows

CLIENTS = 64
WINDOWS_MS = (0, 1, 2, 4, 6, 8, 10, 12, 16, 20)
WORKLOADS: tuple[tuple[str, GeneratedKind, float], ...] = (
    ("messages", "all-short", 0.1),
    ("chat", "chat", 0.2),
)
FLAT = (
    System("AWD (published rules)", "pla-serve", "#c2571a", style=":"),
    System("fcfs", "fcfs", "#8a8a8a", style="--"),
    System("length-aware (ours)", "length-aware", "#0f6b8f"),
)


def fixed(window_ms: float) -> System:
    policy = f"laps:classify=uncached:window_seconds={window_ms / 1000}"
    return System("laps, fixed window", policy, "#c2571a")


def simulate(options: Namespace) -> tuple[dict[str, Any], Runs]:
    runs: Runs = []
    for workload, kind, pause in WORKLOADS:
        count = round(12_000 * options.scale)
        rows = generate_rows(kind, GeneratorOptions(requests=count), options.seed)
        systems = [*((fixed(w), w) for w in WINDOWS_MS), *((system, None) for system in FLAT)]
        for system, window in systems:
            turns = turns_with_history(rows)
            clients = Clients([(turns, CLIENTS)], pause=pause, seed=options.seed)
            result = run(system, machine("14b"), turns, clients)
            about = {"workload": workload, "system": system.label, "window_ms": window}
            runs.append({**about, **summary(result.jobs)})
    return {"machine": "h200-qwen2.5-14b", "instances": 1, "clients": CLIENTS}, runs


def draw(options: Namespace, runs: Runs) -> None:
    picture, axes = figure(2, 2, 9.5, 6)
    for row, (workload, _, _) in zip(axes, WORKLOADS, strict=True):
        for place, name in zip(row, ("mean TTFT, ms", "requests a second"), strict=True):
            panel(place, [run for run in runs if run["workload"] == workload], name)
            place.set_title(f"{workload}: {name}")
    finish(options, picture, axes[0][0], f"One H200, Qwen2.5-14B, {CLIENTS} clients.", 4)


def panel(place: Any, runs: Runs, name: str) -> None:
    def value(found: dict[str, Any]) -> float:
        return float(found["all"]["mean"] * 1e3 if "ms" in name else found["requests_per_s"])

    windows = [found for found in runs if found["window_ms"] is not None]
    place.plot(
        [found["window_ms"] for found in windows],
        [value(found) for found in windows],
        "o-",
        color="#c2571a",
        label="laps, fixed window",
    )
    for system in FLAT:
        (found,) = (found for found in runs if found["system"] == system.label)
        place.axhline(value(found), color=system.color, linestyle=system.style, label=system.label)
    place.axvspan(6, 8, color="#c2571a", alpha=0.08, linewidth=0)
    top = max(value(found) for found in runs)
    place.set_ylim(0, 1.1 * top)
    place.set_xticks(WINDOWS_MS)
    place.set_xlabel("window, ms (shaded: published best)")


if __name__ == "__main__":
    main(__doc__, "fig5", simulate, draw)
