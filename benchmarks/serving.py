"""The headline experiment: short prompts beside long documents, under each policy.

    python benchmarks/serving.py sweep       # tunes the baselines' knobs, about 25 minutes
    python benchmarks/serving.py headline    # the comparison, about 25 minutes
    python benchmarks/serving.py one-class   # chat alone, documents alone, about 15 minutes

SmolLM2, 70% load, one request in ten a document of 2,048 to 4,096 tokens. `headline` takes the
baselines' best knobs from the sweep's result. `--quick` makes any of them a few minutes long, to
see that it works. Ratios are held against what the project promises and printed as pass or miss.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from pla_serve.bench.client import Target
from pla_serve.bench.experiment import Experiment, Outcome, Plan
from pla_serve.bench.figure import draw
from pla_serve.bench.progress import ProgressView
from pla_serve.bench.report import Objectives
from pla_serve.bench.save import save_json
from pla_serve.bench.servers import Entry, fresh, parse_entries
from pla_serve.bench.summary import Summary, headline, summaries
from pla_serve.bench.table import comparison_table
from pla_serve.bench.text import make_filler
from pla_serve.bench.workload import Mix, WorkloadConfig, generate

OURS, PLAIN = "length-aware", "fcfs"
BASELINES = ("fcfs", "hrrn", "srpt")
KNOBS = ((512, 128), (512, 256), (512, 512), (1024, 256), (2048, 128), (2048, 256), (2048, 512))
"""--max-batch-tokens and --long-chunk-tokens."""
NO_LOSS = 0.97
"""Requests per second, to plain fcfs: what a tuned baseline and we ourselves may lose."""
LOAD = 0.7
SERVE = ("--max-predicted-wait", "0")
"""Nobody is refused, so that all policies answer the same requests."""
console = Console()


def workload(mix: Mix, requests: int) -> WorkloadConfig:
    return WorkloadConfig(mix=mix, requests=requests, output_tokens=(8, 24), think_seconds=3.0)


def measure(
    entries: Sequence[Entry], config: WorkloadConfig, options: argparse.Namespace, repeat: int
) -> Outcome:
    """Every entry on fresh servers, interleaved; the rate comes from the first entry's capacity."""
    plan = Plan(
        entries=tuple(entries),
        open_server=fresh([*SERVE, *options.serve]),
        target=Target(""),
        make_workload=lambda rate, repetition: generate(
            replace(config, rate=rate, seed=config.seed + repetition)
        ),
        objectives=Objectives(),
        load=LOAD,
        repeat=repeat,
        idle=True,
    )
    with ProgressView(console, plan.objectives) as view:
        filler = make_filler(secrets.token_hex(8))
        return Experiment(plan, filler, view.observe, view.tell).run()


def sweep(options: argparse.Namespace) -> None:
    knobs = KNOBS[::3] if options.quick else KNOBS
    entries = parse_entries(
        ",".join(
            f"{policy}:max-batch-tokens={budget}:long-chunk-tokens={chunk}"
            for policy in BASELINES
            for budget, chunk in knobs
        )
    )
    config = workload("chat+documents", options.requests or (16 if options.quick else 50))
    outcome = measure((Entry(PLAIN, ("--policy", PLAIN)), *entries), config, options, 1)
    found = report(outcome, options, "sweep", config, {})
    tuned = {policy: best(found, policy) for policy in BASELINES}
    for policy, label in tuned.items():
        console.print(f"best {policy}: {label}", highlight=False)
    amend(options.results / "serving-sweep.json", {"tuned": tuned})


def best(found: Sequence[Summary], policy: str) -> str | None:
    """The entry of a policy with the lowest short P90 TTFT among those that lose no throughput."""
    able = [
        summary
        for summary in found
        if summary.entry.startswith(policy)
        and summary.values["short_ttft_p90"] is not None
        and (summary.ratios["requests_per_second"] or 0) >= NO_LOSS
    ]
    return min(able, key=lambda s: s.values["short_ttft_p90"] or 0).entry if able else None


def compare(options: argparse.Namespace) -> None:
    labels = options.tuned.split(",") if options.tuned else tuned_entries(options.results)
    labels = [label for label in labels if label != PLAIN]
    entries = parse_entries(",".join((PLAIN, *labels, OURS)))
    config = workload("chat+documents", options.requests or (16 if options.quick else 100))
    outcome = measure(entries, config, options, options.repeat or (1 if options.quick else 3))
    found = {summary.entry: summary for summary in summaries(outcome, PLAIN)}
    if OURS not in found:
        return
    checks = headline_checks(found)
    report(outcome, options, "headline", config, checks)
    show_checks(checks)


def tuned_entries(results: Path) -> list[str]:
    try:
        tuned = json.loads((results / "serving-sweep.json").read_text())["tuned"]
    except (OSError, KeyError) as error:
        raise SystemExit(
            f"no tuned baselines ({error}): run sweep first, or give --tuned"
        ) from None
    return [label for label in tuned.values() if label]


def headline_checks(found: dict[str, Summary]) -> dict[str, dict]:
    ours, plain = found[OURS].values, found[PLAIN].values
    tuned = [summary for name, summary in found.items() if name != OURS]
    rival = min(tuned, key=lambda summary: summary.values["short_ttft_p90"] or float("inf"))
    name = rival.entry
    return {
        "short P90 TTFT to its idle value": at_most(ours["short_ttft_p90_over_idle"], 3.0),
        f"short P90 TTFT of the best baseline ({name}) to ours": at_least(
            ratio(rival.values["short_ttft_p90"], ours["short_ttft_p90"]), 5.0
        ),
        "requests/s to fcfs": at_least(
            ratio(ours["requests_per_second"], plain["requests_per_second"]), NO_LOSS
        ),
        "long P99 TTFT to fcfs": at_most(
            ratio(ours["long_ttft_p99"], plain["long_ttft_p99"]), 1.15
        ),
    }


def one_class(options: argparse.Namespace) -> None:
    """With one class only, the policies should be the same within noise."""
    for mix, requests in (("chat", 120), ("documents", 24)):
        config = workload(mix, options.requests or (12 if options.quick else requests))
        entries = parse_entries(f"{PLAIN},{OURS}")
        outcome = measure(entries, config, options, options.repeat or (1 if options.quick else 3))
        if len({run.entry for run in outcome.runs}) < len(entries):
            return
        checks = one_class_checks(outcome)
        report(outcome, options, mix, config, checks)
        show_checks(checks)


def one_class_checks(outcome: Outcome) -> dict[str, dict]:
    """The noise is how far fcfs is from itself: (largest - smallest) / median of its runs, at
    least 5%."""
    plain, ours = summaries(outcome, PLAIN)
    runs = [headline(run) for run in outcome.of(PLAIN)]
    checks = {}
    for name in ("all_ttft_p50", "all_ttft_p90", "all_latency_p50"):
        values = [value for run in runs if (value := run[name]) is not None]
        middle = plain.values[name] or 1.0
        noise = max(0.05, (max(values) - min(values)) / middle) if values else 0.05
        checks[f"{name} to fcfs"] = at_most(ours.ratios[name], 1 + noise)
    checks["requests/s to fcfs"] = at_least(ours.ratios["requests_per_second"], NO_LOSS)
    return checks


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def at_most(value: float | None, limit: float) -> dict:
    return {
        "value": value,
        "wanted": f"<= {limit:.2f}",
        "pass": value is not None and value <= limit,
    }


def at_least(value: float | None, limit: float) -> dict:
    return {
        "value": value,
        "wanted": f">= {limit:.2f}",
        "pass": value is not None and value >= limit,
    }


def report(
    outcome: Outcome,
    options: argparse.Namespace,
    name: str,
    config: WorkloadConfig,
    checks: dict[str, dict],
) -> list[Summary]:
    """Prints the comparison, writes JSON and PNG."""
    found = summaries(outcome, PLAIN)
    console.print(comparison_table(found, PLAIN))
    path = options.results / f"serving-{name}.json"
    parameters = {"config": asdict(config), "load": LOAD, "serve": [*SERVE, *options.serve]}
    save_json(path, outcome, found, parameters, records=name == "headline")  # for agreement.py
    amend(path, {"checks": checks})
    draw(
        found,
        path.with_suffix(".png"),
        title={"chat": "Chat alone", "documents": "Documents alone"}.get(
            name, "Time to first token of chat turns while long documents run"
        ),
        subtitle=f"SmolLM2-135M, {LOAD:.0%} load ({outcome.rate:.2f} requests/s)",
    )
    console.print(f"saved {path}", highlight=False)
    return found


def amend(path: Path, extra: dict[str, object]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | extra, indent=1) + "\n")


def show_checks(checks: dict[str, dict]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("what must hold", "measured", "wanted", ""):
        table.add_column(head)
    for name, check in checks.items():
        value = "-" if check["value"] is None else f"{check['value']:.2f}"
        table.add_row(name, value, check["wanted"], "pass" if check["pass"] else "miss")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("sweep", "headline", "one-class"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--requests", type=int, help="of a run, in place of the defaults")
    parser.add_argument("--repeat", type=int, help="rounds over all entries; medians count")
    parser.add_argument("--tuned", help="baseline entries, in place of the sweep's")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="flags of all servers"
    )
    options = parser.parse_args()
    {"sweep": sweep, "headline": compare, "one-class": one_class}[options.what](options)


if __name__ == "__main__":
    main()
