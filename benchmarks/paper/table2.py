"""Table 2: offline distillation, 4 prefill and 4 decode instances, answers of 1K tokens.

All prompts are there at the start and nothing has a deadline; what counts is when the last answer
is complete. H200 with Qwen2.5-32B; KV goes to the decode instances at the machine's rate. At most
160 answers decode together on an instance, as many as its KV memory holds. Answers have 512 to
1,536 tokens: were all equal, they would decode in waves, and how full the last one is would decide.
Each number is the mean of three drawings.

The published system runs token-max mode of AWD: shorts until a batch has 4,096 tokens, padded to
the published grid, longs one at a time.

    python benchmarks/paper/table2.py -o benchmarks/results/paper/table2
"""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

import numpy as np
from common import (
    LEAN_HOST,
    Runs,
    System,
    figure,
    machine,
    main,
    ordinary,
    our_ladder,
    published_grid,
    run,
    single_turns,
)

from pla_serve.simulator.machine import Machine
from pla_serve.simulator.turns import OpenLoop
from pla_serve.traces.lengths import Lengths, Lmsys, Lognormal

OUTPUTS = (512, 1536)
DRAWINGS = 3
DATASETS: dict[str, Lengths] = {
    "messages (LMSYS-Chat-1M)": Lmsys(),
    "prompts of 1K (lognormal)": Lognormal(1024, 0.8, 16, 8192),
}


def systems() -> tuple[System, ...]:
    most = {"max_batch_requests": 160}
    host = LEAN_HOST
    return (
        System("fcfs", "fcfs", "#8a8a8a", ordinary(host), config=most),
        System("hrrn", "hrrn", "#d0a000", ordinary(host), config=most),
        System(
            "published, token-max",
            "pla-serve:mode=token_max",
            "#c2571a",
            published_grid(host),
            config=most,
        ),
        System("ours", "length-aware", "#0f6b8f", our_ladder(host), "predicted", config=most),
    )


def simulate(options: Namespace) -> tuple[dict[str, Any], Runs]:
    chip = machine("32b")
    runs: Runs = []
    for dataset, lengths in DATASETS.items():
        base: dict[str, Any] | None = None
        for system in systems():
            drawn = [
                measure(system, chip, lengths, options.seed + number, options.scale)
                for number in range(DRAWINGS)
            ]
            found: dict[str, Any] = {
                name: float(np.mean([d[name] for d in drawn])) for name in drawn[0]
            }
            base = base or found
            found["against_fcfs"] = found["seconds"] / base["seconds"] - 1
            found["prefill_against_fcfs"] = found["prefill_seconds"] / base["prefill_seconds"] - 1
            each = [d["seconds"] for d in drawn]
            runs.append({"dataset": dataset, "system": system.label, **found, "each_seconds": each})
    return {"machine": chip.name, "prefill_instances": 4, "decode_instances": 4}, runs


def measure(
    system: System, chip: Machine, lengths: Lengths, seed: int, scale: float
) -> dict[str, float]:
    """One drawing of prompts and answers."""
    rng = random.Random(seed)
    prompts = [lengths.sample(rng) for _ in range(round(2000 * scale))]
    turns = single_turns(prompts)
    for turn in turns:
        turn.output_tokens = rng.randint(*OUTPUTS)
    result = run(
        system, chip, turns, OpenLoop(turns), instances=4, decode="apart", decode_instances=4
    )
    busy = sum(node.busy_seconds for name, node in result.nodes.items() if name[0] == "d")
    return {
        "requests": len(turns),
        "prompt_tokens": sum(prompts),
        "seconds": result.end,
        "prefill_seconds": max(job.first_token for job in result.jobs),
        "decode_utilisation": busy / 4 / result.end,
    }


def draw(options: Namespace, runs: Runs) -> None:
    picture, axes = figure(2, 2, 9.5, 4.2)
    panels = {
        "until the last answer, s": ("seconds", "against_fcfs"),
        "until the last first token, s": ("prefill_seconds", "prefill_against_fcfs"),
    }
    for row, dataset in zip(axes, DATASETS, strict=True):
        some = [found for found in runs if found["dataset"] == dataset]
        for place, (title, (name, change)) in zip(row, panels.items(), strict=True):
            for y, (found, system) in enumerate(zip(some, systems(), strict=True)):
                place.barh([y], [found[name]], color=system.color, height=0.7)
                text = f" {found[name]:.4g}" + (f" ({found[change]:+.1%})" if y else "")
                place.annotate(text, (found[name], y), va="center", fontsize=8)
            place.set_yticks(range(len(some)), [found["system"] for found in some])
            place.invert_yaxis()
            place.set_xlim(0, 1.3 * max(found[name] for found in some))
            place.set_title(f"{dataset}:\n{title}")
            place.grid(axis="y", visible=False)
    picture.suptitle(
        "Simulated. 4 prefill + 4 decode H200, Qwen2.5-32B, 2,000 prompts, answers of 1K.",
        x=0.01,
        ha="left",
        color="#666666",
        fontsize=9,
    )
    picture.savefig(options.output.with_suffix(".png"))


if __name__ == "__main__":
    main(__doc__, "table2", simulate, draw)
