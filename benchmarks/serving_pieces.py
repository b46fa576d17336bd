"""A long experiment in pieces: runs of earlier pieces from their file, and all of them together."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pla_serve.bench.calibrate import Costs
from pla_serve.bench.client import TimedRequest
from pla_serve.bench.experiment import BenchRun, ExperimentResult
from pla_serve.bench.load import Record, RunResult
from pla_serve.bench.report import Objectives, Percentiles, summarise
from pla_serve.bench.workload import BenchTurn, BenchWorkload


def read(path: Path) -> ExperimentResult:
    """What `save_json` wrote, with records.

    Raises:
        OSError, KeyError, ValueError: it is not there, or was written otherwise.
    """
    content = json.loads(path.read_text())
    costs = content["costs"]
    outcome = ExperimentResult(content["rate"])
    outcome.costs = Costs(tuple((n, t) for n, t in costs["prefill"]), costs["decode_token"])
    outcome.workloads = [BenchWorkload(w["workload"], (), w) for w in content["workloads"]]
    outcome.runs = [_run(entry) for entry in content["runs"]]
    return outcome


def joined(earlier: ExperimentResult, later: ExperimentResult) -> ExperimentResult:
    """Both, as if they had been measured in one go."""
    first = 1 + max(run.repetition for run in earlier.runs)
    moved = [
        BenchRun(r.entry, first + r.repetition, r.report, r.idle, r.result) for r in later.runs
    ]
    return ExperimentResult(
        earlier.rate,
        earlier.costs,
        [*earlier.runs, *moved],
        [*earlier.workloads, *later.workloads],
        later.interrupted,
    )


def pooled(outcome: ExperimentResult) -> ExperimentResult:
    """One run for each entry, with the requests of all its pieces: a P99 needs many."""
    entries = dict.fromkeys(run.entry for run in outcome.runs)
    runs = [_pool(outcome.of(entry)) for entry in entries]
    return ExperimentResult(
        outcome.rate, outcome.costs, runs, outcome.workloads, outcome.interrupted
    )


def _pool(runs: Sequence[BenchRun]) -> BenchRun:
    result = RunResult(
        [record for run in runs for record in run.result.records],
        sum(run.result.seconds for run in runs),
        sum(run.result.planned for run in runs),
        next((run.result.stopped for run in runs if run.result.stopped), None),
    )
    idles = [run.idle for run in runs if run.idle is not None]
    return BenchRun(runs[0].entry, 0, summarise(result, Objectives()), _middle(idles), result)


def _middle(found: Sequence[Percentiles]) -> Percentiles | None:
    """Medians over the pieces."""
    if not found:
        return None
    ranks = [statistics.median(getattr(p, rank) for p in found) for rank in ("p50", "p90", "p99")]
    mean = statistics.fmean(p.mean for p in found)
    return Percentiles(*ranks, mean, sum(p.count for p in found))


def _run(entry: dict[str, Any]) -> BenchRun:
    report, idle = entry["report"], entry["idle_ttft"]
    records = [_record(record) for record in entry["records"]]
    result = RunResult(records, report["seconds"], report["planned"], report["stopped"])
    return BenchRun(
        entry["entry"],
        entry["repetition"],
        summarise(result, Objectives()),
        Percentiles(**idle) if idle else None,
        result,
    )


def _record(content: dict[str, Any]) -> Record:
    turn = BenchTurn(content["id"], content["kind"], (), content["new_tokens"], 0)
    gaps = content["gaps"]
    first = content["first"]
    exchange = TimedRequest(
        sent=content["sent"],
        first=first,
        last=None if first is None else first + sum(gaps),
        done=content["done"],
        gaps=gaps,
        pause=content.get("pause"),
        prompt_tokens=content["prompt_tokens"],
        cached_tokens=content["cached_tokens"],
        output_tokens=content["output_tokens"],
        error=content["error"],
        detail=content["detail"],
    )
    return Record(turn, content["session"], content["due"], exchange)
