"""Fig. 1 and 3: P90 TTFT of one class against the concurrency of the other.

Closed loop on one H200 with Qwen2.5-32B. Short prompts have fewer than 64 tokens (sizes of
LMSYS-Chat-1M), long ones 1,025 to 8,192 (lognormal, median 2,048). Prompts are unique. Between an
answer's first token and the client's next request lies a second on average (exponential), in which
the answer decodes elsewhere.

    python benchmarks/paper/fig1_3.py -o benchmarks/results/paper/fig1_3
"""

from __future__ import annotations

import random
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
    rank,
    run,
    seconds_axis,
    single_turns,
    ticks,
    ttft,
)

from pla_serve.traces.lengths import Lmsys, Lognormal

SHORT_CLIENTS = 8
LONG_CLIENTS = 4
PAUSE = 1.0
OTHERS = (0, 1, 2, 4, 8, 16, 32, 64)
SYSTEMS = (
    System("fcfs (vLLM)", "fcfs", "#8a8a8a"),
    System("hrrn (SGLang)", "hrrn", "#d0a000"),
    System("laps (published)", "laps", "#c2571a"),
    System("length-aware (ours)", "length-aware", "#0f6b8f"),
)


def prompts(seed: int, count: int, longs: bool) -> list[int]:
    rng, drawn = random.Random(f"{seed}/{longs}"), []
    lengths = Lognormal(2048, 0.6) if longs else Lmsys()
    low, high = (1025, 8192) if longs else (2, 63)
    while len(drawn) < count:
        tokens = lengths.sample(rng)
        if low <= tokens <= high:
            drawn.append(tokens)
    return drawn


def measure(system: System, shorts: int, longs: int, seed: int, scale: float) -> dict[str, Any]:
    """P90 of both classes, over the time in which both have requests to send."""
    groups, clients, first = [], [], 0
    for count, is_long, many in ((shorts, False, 8000), (longs, True, 1000)):
        if count:
            turns = single_turns(prompts(seed, round(many * scale), is_long), first=first)
            groups.append((turns, count))
            clients.append(is_long)
            first += len(turns)
    turns = [turn for some, _ in groups for turn in some]
    result = run(system, machine("32b"), turns, Clients(groups, pause=PAUSE, seed=seed))
    of = {
        is_long: [result.jobs[turn.index] for turn in some]
        for is_long, (some, _) in zip(clients, groups, strict=True)
    }
    until = min(max(job.arrival for job in jobs) for jobs in of.values())
    found: dict[str, Any] = {"short_clients": shorts, "long_clients": longs}
    for is_long, name in ((False, "short"), (True, "long")):
        times = ttft([job for job in of.get(is_long, []) if job.arrival <= until])
        found[name] = {"count": len(times), "p50": rank(times, 50), "p90": rank(times, 90)}
    return found


def simulate(options: Namespace) -> tuple[dict[str, Any], Runs]:
    runs: Runs = []
    for system in SYSTEMS:
        for other in OTHERS:
            for panel, shorts, longs in (
                ("short", SHORT_CLIENTS, other),
                ("long", other, LONG_CLIENTS),
            ):
                found = measure(system, shorts, longs, options.seed, options.scale)
                runs.append({"system": system.label, "panel": panel, "others": other, **found})
    return {"machine": "h200-qwen2.5-32b", "instances": 1}, runs


def draw(options: Namespace, runs: Runs) -> None:
    picture, axes = figure(1, 2, 9.5, 3.9)
    for panel, place, title in (
        ("short", axes[0][0], f"P90 TTFT of {SHORT_CLIENTS} short clients (< 64 tokens), s"),
        ("long", axes[0][1], f"P90 TTFT of {LONG_CLIENTS} long clients (> 1K tokens), s"),
    ):
        for system in SYSTEMS:
            rows = [r for r in runs if r["system"] == system.label and r["panel"] == panel]
            place.plot(
                [max(0.5, row["others"]) for row in rows],
                [row[panel]["p90"] for row in rows],
                "o-",
                color=system.color,
                label=system.label,
            )
        place.set_title(title)
        seconds_axis(place)
        other = "long" if panel == "short" else "short"
        ticks(place, [max(0.5, other) for other in OTHERS], f"{other} clients beside them")
        place.set_xticklabels([f"{other:g}" for other in OTHERS])
    finish(options, picture, axes[0][0], "One H200, Qwen2.5-32B, closed loop.", 4)


if __name__ == "__main__":
    main(__doc__, "fig1_3", simulate, draw)
