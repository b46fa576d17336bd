"""Fig. 8: mixed with decode on one instance.

One H200 with Qwen2.5-32B, closed loop: a client sends its next request when its answer is complete.
Chat as in LMSYS-Chat-1M with a tenth documents (median 2,048 tokens) and answers of 128 tokens
(median). Mode mix: decode steps join the batches of prefills as the policy puts them. PD temporal:
the two never share a batch.

    python benchmarks/paper/fig8.py -o benchmarks/results/paper/fig8
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
from common import (
    Clients,
    Make,
    Runs,
    System,
    figure,
    finish,
    machine,
    main,
    run,
    summary,
    ticks,
    turns_with_history,
)

from pla_serve.policy.registry import parse_policy
from pla_serve.policy.temporal import PrefillFirst
from pla_serve.traces.generator import GeneratorOptions, generate_rows

CLIENTS = (1, 2, 4, 8, 16, 32, 64)


def temporal(text: str) -> Make:
    """The policy for prefills, decode in the gaps."""
    spec = parse_policy(text)
    return lambda config, cost: PrefillFirst(spec.create(config, cost), config, cost)


SYSTEMS = (
    System("fcfs, mix", "fcfs", "#8a8a8a"),
    System("fcfs 2,048, mix", "fcfs:max_batch_tokens=2048", "#444444"),
    System("laps, mix", "laps:classify=uncached", "#c2571a"),
    System("laps, PD temporal", temporal("laps:classify=uncached"), "#c2571a", style="--"),
    System("ours, mix", "length-aware", "#0f6b8f"),
    System("ours, PD temporal", temporal("length-aware"), "#0f6b8f", style="--"),
)


def simulate(options: Namespace) -> tuple[dict[str, Any], Runs]:
    chip = machine("32b")
    runs: Runs = []
    for many in CLIENTS:
        count = round(max(300, 60 * many) * options.scale)
        made = GeneratorOptions(requests=count, document=2048)
        rows = generate_rows("chat+documents", made, options.seed)
        for system in SYSTEMS:
            turns = turns_with_history(rows)
            result = run(system, chip, turns, Clients([(turns, many)]), decode="same")
            gaps = [
                (job.finished - job.first_token) / (job.output_tokens - 1)
                for job in result.jobs
                if job.output_tokens > 1
            ]
            found = summary(result.jobs)
            found["requests_per_s"] = len(result.jobs) / result.end
            tokens = sum(job.output_tokens for job in result.jobs)
            found |= {"output_tokens_per_s": tokens / result.end}
            found |= {"tpot_mean": float(np.mean(gaps)), "tpot_p90": float(np.percentile(gaps, 90))}
            runs.append({"system": system.label, "clients": many, **found})
    return {"machine": chip.name, "instances": 1}, runs


def draw(options: Namespace, runs: Runs) -> None:
    base = {
        found["clients"]: found["output_tokens_per_s"]
        for found in runs
        if found["system"] == SYSTEMS[0].label
    }
    panels: dict[str, Callable[[dict[str, Any]], float]] = {
        "output tokens a second, against fcfs, %": lambda found: (
            100 * (found["output_tokens_per_s"] / base[found["clients"]] - 1)
        ),
        "P90 TTFT of shorts, ms": lambda found: 1e3 * found["short"]["p90"],
        "mean TTFT of all, ms": lambda found: 1e3 * found["all"]["mean"],
        "mean time a token, ms": lambda found: 1e3 * found["tpot_mean"],
    }
    picture, axes = figure(2, 2, 9.5, 6.4)
    for place, (name, read) in zip(axes.flat, panels.items(), strict=True):
        for system in SYSTEMS:
            rows = [found for found in runs if found["system"] == system.label]
            place.plot(
                CLIENTS,
                [read(found) for found in rows],
                f"o{system.style}",
                color=system.color,
                label=system.label,
            )
        ticks(place, CLIENTS, "clients")
        if "%" not in name:
            place.set_ylim(bottom=0)
        place.set_title(name)
    finish(options, picture, axes[0][0], "One H200, Qwen2.5-32B, answers decode on it.", 3)


if __name__ == "__main__":
    main(__doc__, "fig8", simulate, draw)
