"""The headline experiment: short prompts beside long documents, under each policy.

    python benchmarks/serving.py sweep            # tunes the baselines in the simulator, a minute
    python benchmarks/serving.py headline         # the comparison, 9 minutes
    python benchmarks/serving.py headline --more  # another piece of it, with other requests
    python benchmarks/serving.py one-class        # chat alone, documents alone, 9 minutes

SmolLM2, 70% load, one request in ten a document of 2,048 to 4,096 tokens. `sweep` tries every
setting of the baselines on virtual time, with a profile of this machine, and keeps the best one of
all and the best of those that cost longs little; `headline` measures these. Pieces are pooled:
percentiles are over the requests of all of them. Ratios are held against what the project promises
and printed as pass or miss.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from math import inf
from pathlib import Path

import msgspec
import serving_pieces as pieces
from rich import box
from rich.console import Console
from rich.table import Table
from serving_sim import Simulated, search

from pla_serve.bench.client import RequestTarget
from pla_serve.bench.experiment import Experiment, ExperimentPlan, ExperimentResult
from pla_serve.bench.figure import draw
from pla_serve.bench.progress import ProgressView
from pla_serve.bench.report import Objectives
from pla_serve.bench.save import save_json, write_json
from pla_serve.bench.servers import ServerEntry, fresh, parse_entries
from pla_serve.bench.summary import Summary, headline, summaries
from pla_serve.bench.table import comparison_table
from pla_serve.bench.text import make_filler
from pla_serve.bench.workload import Mix, WorkloadConfig, generate
from pla_serve.environment import describe
from pla_serve.simulator.machine import load_machine

OURS, PLAIN = "length-aware", "fcfs"
BASELINES = ("fcfs", "hrrn", "srpt")
KNOBS = tuple(
    (budget, chunk)
    for budget in (128, 256, 512, 1024, 2048)
    for chunk in (64, 128, 256, 512, 1024)
    if chunk <= budget
)
"""--max-batch-tokens and --long-chunk-tokens."""
SEEDS = 16
NO_LOSS = 0.97
"""Requests per second, to plain fcfs: what a tuned baseline and we ourselves may lose."""
LONG_LOSS = 1.15
"""P99 of longs, to plain fcfs: likewise."""
LOAD = 0.7
SERVE = ("--max-predicted-wait", "0")
"""Nobody is refused, so that all policies answer the same requests."""
console = Console()


def workload(mix: Mix, requests: int) -> WorkloadConfig:
    return WorkloadConfig(mix=mix, requests=requests, output_tokens=(8, 24), think_seconds=3.0)


def measure(
    entries: Sequence[ServerEntry],
    config: WorkloadConfig,
    options: argparse.Namespace,
    repeat: int,
    rate: float | None = None,
) -> ExperimentResult:
    """Every entry on fresh servers, interleaved; the rate comes from the first entry's capacity,
    if it is not given."""
    plan = ExperimentPlan(
        entries=tuple(entries),
        open_server=fresh([*SERVE, *options.serve]),
        target=RequestTarget(""),
        make_workload=lambda rate, repetition: generate(
            replace(config, rate=rate, seed=config.seed + repetition)
        ),
        objectives=Objectives(),
        rate=rate or 1.0,
        load=LOAD if rate is None else None,
        repeat=repeat,
        idle=True,
    )
    with ProgressView(console, plan.objectives) as view:
        filler = make_filler(secrets.token_hex(8))
        return Experiment(plan, filler, view.observe, view.tell).run()


def sweep(options: argparse.Namespace) -> None:
    machine = load_machine(str(options.machine))
    entries = [PLAIN, OURS, *BASELINES, *(knobs(p, b, c) for p in BASELINES for b, c in KNOBS)]
    config = workload("chat+documents", options.requests or 100)
    rows = search(list(dict.fromkeys(entries)), config, LOAD, machine, SEEDS)
    rivals = [row for row in rows if row.entry != OURS and row.rate_to_plain >= NO_LOSS]
    fair = [row for row in rivals if row.long_p99_to_plain <= LONG_LOSS]
    picks = {
        kind: min(found, key=lambda row: row.short_ttft_p90).entry
        for kind, found in (("any", rivals), ("fair", fair))
    }
    show_sweep(rows, picks)
    content = {
        "environment": describe(),
        "machine": msgspec.to_builtins(machine),
        "config": asdict(config),
        "load": LOAD,
        "seeds": SEEDS,
        "tuned": picks,
        "rows": [asdict(row) for row in rows],
    }
    write_json(options.results / "serving-sweep.json", content)


def knobs(policy: str, budget: int, chunk: int) -> str:
    return f"{policy}:max-batch-tokens={budget}:long-chunk-tokens={chunk}"


def show_sweep(rows: Sequence[Simulated], picks: dict[str, str]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=f"simulated, means of {SEEDS} seeds")
    for head in ("", "short P90", "long P99 to fcfs", "requests/s to fcfs", ""):
        table.add_column(head)
    for row in sorted(rows, key=lambda row: row.short_ttft_p90):
        ratios = (row.long_p99_to_plain, row.rate_to_plain)
        mark = ", ".join(kind for kind, entry in picks.items() if entry == row.entry)
        cells = (row.entry, f"{row.short_ttft_p90:.3f} s", *(f"{ratio:.2f}" for ratio in ratios))
        table.add_row(*cells, mark)
    console.print(table)


def compare(options: argparse.Namespace) -> None:
    labels = options.tuned.split(",") if options.tuned else tuned_entries(options.results)
    labels = [label for label in labels if label != PLAIN]
    entries = parse_entries(",".join((PLAIN, *labels, OURS)))
    config = workload("chat+documents", options.requests or 90)
    path = options.results / "serving-headline.json"
    earlier = pieces.read(path) if options.more else None
    if earlier is not None:
        config = replace(config, seed=len(earlier.workloads))
    rate = None if earlier is None else earlier.rate
    outcome = measure(entries, config, options, options.repeat or 1, rate)
    if earlier is not None:
        outcome = pieces.joined(earlier, outcome)
    whole = pieces.pooled(outcome)
    found = {summary.entry: summary for summary in summaries(whole, PLAIN)}
    if OURS not in found:
        return
    checks = headline_checks(found)
    report(whole, options, "headline", config, checks, outcome)
    show_checks(checks)


def tuned_entries(results: Path) -> list[str]:
    try:
        tuned = json.loads((results / "serving-sweep.json").read_text())["tuned"]
    except (OSError, KeyError) as error:
        raise SystemExit(
            f"no tuned baselines ({error}): run sweep first, or give --tuned"
        ) from None
    return list(dict.fromkeys(tuned.values()))


def headline_checks(found: dict[str, Summary]) -> dict[str, dict]:
    ours, plain = found[OURS].values, found[PLAIN].values
    rivals = [summary for name, summary in found.items() if name != OURS]
    fair = [
        rival
        for rival in rivals
        if (rival.ratios["long_ttft_p99"] or inf) <= LONG_LOSS
        and (rival.ratios["requests_per_second"] or 0) >= NO_LOSS
    ]
    checks = {"short P90 TTFT to its idle value": at_most(ours["short_ttft_p90_over_idle"], 3.0)}
    for kind, some in (("any baseline", rivals), ("baselines that keep long P99", fair)):
        best = min(some, key=lambda summary: summary.values["short_ttft_p90"] or inf)
        checks[f"short P90 TTFT of the best of {kind} ({best.entry}) to ours"] = at_least(
            ratio(best.values["short_ttft_p90"], ours["short_ttft_p90"]), 5.0
        )
    checks["requests/s to fcfs"] = at_least(
        ratio(ours["requests_per_second"], plain["requests_per_second"]), NO_LOSS
    )
    checks["long P99 TTFT to fcfs"] = at_most(
        ratio(ours["long_ttft_p99"], plain["long_ttft_p99"]), LONG_LOSS
    )
    return checks


def one_class(options: argparse.Namespace) -> None:
    """With one class only, the policies should be the same within noise."""
    for mix, requests in (("chat", 60), ("documents", 12)):
        config = workload(mix, options.requests or requests)
        entries = parse_entries(f"{PLAIN},{OURS}")
        outcome = measure(entries, config, options, options.repeat or 2)
        if len({run.entry for run in outcome.runs}) < len(entries):
            return
        checks = one_class_checks(outcome)
        report(outcome, options, mix, config, checks)
        show_checks(checks)


def one_class_checks(outcome: ExperimentResult) -> dict[str, dict]:
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
    outcome: ExperimentResult,
    options: argparse.Namespace,
    name: str,
    config: WorkloadConfig,
    checks: dict[str, dict],
    raw: ExperimentResult | None = None,
) -> None:
    """Prints the comparison, writes JSON and PNG. ``raw``: the pieces that were pooled."""
    found = summaries(outcome, PLAIN)
    console.print(comparison_table(found, PLAIN))
    path = options.results / f"serving-{name}.json"
    parameters = {"config": asdict(config), "load": LOAD, "serve": [*SERVE, *options.serve]}
    # Records are for further pieces, and for agreement.py.
    save_json(path, raw or outcome, found, parameters, records=raw is not None)
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
    parser.add_argument("--requests", type=int, help="of a run, in place of the defaults")
    parser.add_argument("--repeat", type=int, help="rounds over all entries; medians count")
    parser.add_argument("--more", action="store_true", help="add to the headline's result")
    parser.add_argument("--machine", type=Path, default=Path("benchmarks/results/cpu-smollm2.json"))
    parser.add_argument("--tuned", help="baseline entries, in place of the sweep's")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--serve", nargs=argparse.REMAINDER, default=[], help="flags of all servers"
    )
    options = parser.parse_args()
    {"sweep": sweep, "headline": compare, "one-class": one_class}[options.what](options)


if __name__ == "__main__":
    main()
