"""Table 2: offline distillation, 4 prefill and 4 decode instances, answers of 1,024 tokens.

All prompts are there at the start and nothing has a deadline; what counts is when the last answer
is complete. H200 with Qwen2.5-32B; KV goes to the decode instances at the machine's rate. At most
160 answers decode together on an instance, as many as its KV memory holds.

The published system runs token-max mode of AWD: shorts until a batch has 4,096 tokens, padded to
the published grid, longs one at a time.

    python benchmarks/paper/table2.py -o benchmarks/results/paper/table2
"""

from __future__ import annotations

import random
from typing import Any

from common import (
    LEAN_HOST,
    System,
    arguments,
    figure,
    machine,
    ordinary,
    our_ladder,
    published_grid,
    run,
    save,
    single_turns,
)
from published import Published

from pla_serve.policy.awd import AwdOptions, Mode
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.simulator.turns import OpenLoop
from pla_serve.traces.lengths import Lengths, Lmsys, Lognormal

OUTPUT = 1024
DATASETS: dict[str, Lengths] = {
    "messages (LMSYS-Chat-1M)": Lmsys(),
    "prompts of 1K (lognormal)": Lognormal(1024, 0.8, 16, 8192),
}


def token_max(config: PolicyConfig, cost: CostModel) -> Published:
    return Published(config, cost, AwdOptions(mode=Mode.TOKEN_MAX))


def systems() -> tuple[System, ...]:
    most = {"max_batch_requests": 160}
    host = LEAN_HOST
    return (
        System("fcfs", "fcfs", "#8a8a8a", ordinary(host), config=most),
        System("hrrn", "hrrn", "#d0a000", ordinary(host), config=most),
        System("published, token-max", token_max, "#c2571a", published_grid(host), config=most),
        System("ours", "length-aware", "#0f6b8f", our_ladder(host), "predicted", config=most),
    )


def main() -> None:
    options = arguments(__doc__, "table2")
    chip = machine("32b")
    runs: list[dict[str, Any]] = []
    for dataset, lengths in DATASETS.items():
        rng = random.Random(f"{options.seed}/{dataset}")
        prompts = [lengths.sample(rng) for _ in range(round(2000 * options.scale))]
        for system in systems():
            turns = single_turns(prompts, OUTPUT)
            result = run(
                system,
                chip,
                turns,
                OpenLoop(turns),
                instances=4,
                decode="apart",
                decode_instances=4,
            )
            prefilled = max(job.first_token for job in result.jobs)
            busy = sum(node.busy_seconds for name, node in result.nodes.items() if name[0] == "d")
            runs.append(
                {
                    "dataset": dataset,
                    "system": system.label,
                    "requests": len(turns),
                    "prompt_tokens": sum(prompts),
                    "seconds": result.end,
                    "prefill_seconds": prefilled,
                    "decode_utilisation": busy / 4 / result.end,
                }
            )
            base = next(one for one in runs if one["dataset"] == dataset)
            runs[-1]["against_fcfs"] = result.end / base["seconds"] - 1
            runs[-1]["prefill_against_fcfs"] = prefilled / base["prefill_seconds"] - 1
    save(options, {"machine": chip.name, "prefill_instances": 4, "decode_instances": 4}, runs)
    draw(options, runs)


def draw(options: Any, runs: list[dict[str, Any]]) -> None:
    picture, axes = figure(1, 2, 9.5, 3)
    for place, name, title in (
        (axes[0][0], "seconds", "until the last answer, s"),
        (axes[0][1], "prefill_seconds", "until the last first token, s"),
    ):
        labels = []
        for y, found in enumerate(runs):
            color = next(s.color for s in systems() if s.label == found["system"])
            place.barh([y], [found[name]], color=color, height=0.7)
            change = "against_fcfs" if name == "seconds" else "prefill_against_fcfs"
            text = f" {found[name]:.4g}" + (f" ({found[change]:+.1%})" if found[change] else "")
            place.annotate(text, (found[name], y), va="center", fontsize=8)
            labels.append(found["system"])
        place.set_yticks(range(len(runs)), labels if name == "seconds" else [])
        place.invert_yaxis()
        place.set_xlim(0, 1.35 * max(found[name] for found in runs))
        place.set_title(title)
        place.grid(axis="y", visible=False)
    half = len(runs) // 2
    for i, dataset in enumerate(DATASETS):
        axes[0][1].annotate(
            dataset,
            (0.99, i * half + half - 1),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            fontsize=8,
            color="#666666",
        )
    picture.suptitle(
        "Simulated. 4 prefill + 4 decode H200, Qwen2.5-32B, 2,000 prompts, 1,024 tokens each.",
        x=0.01,
        ha="left",
        color="#666666",
        fontsize=9,
    )
    picture.savefig(options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
