"""Writes results as JSON, with all that is needed to repeat the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec

from pla_serve.bench.experiment import BenchRun, ExperimentResult
from pla_serve.bench.load import Record
from pla_serve.bench.summary import Summary
from pla_serve.environment import describe


def save_json(
    path: Path,
    outcome: ExperimentResult,
    summaries: Sequence[Summary],
    parameters: dict[str, object],
    *,
    records: bool,
) -> None:
    """Write the results of an experiment, and make the folder if it is missing."""
    content = {
        "environment": describe(),
        "parameters": parameters,
        "workloads": [workload.parameters for workload in outcome.workloads],
        "rate": outcome.rate,
        "costs": asdict(outcome.costs) if outcome.costs else None,
        "interrupted": outcome.interrupted,
        "summary": [asdict(summary) for summary in summaries],
        "runs": [_run(run, records) for run in outcome.runs],
    }
    write_json(path, content)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON, and make the folder if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def _run(run: BenchRun, records: bool) -> dict[str, object]:
    entry: dict[str, object] = {
        "entry": run.entry,
        "repetition": run.repetition,
        "idle_ttft": asdict(run.idle) if run.idle else None,
        "report": asdict(run.report),
    }
    if records:
        entry["records"] = [_record(record) for record in run.result.records]
    return entry


def _record(record: Record) -> dict[str, object]:
    """Return one request without its text, JSON-ready."""
    exchange = record.exchange
    return {
        "id": record.turn.id,
        "kind": record.turn.kind,
        "session": record.session,
        "tier": None if record.tier is None else record.tier.name,
        "due": record.due,
        "sent": exchange.sent,
        "first": exchange.first,
        "done": exchange.done,
        "gaps": [round(gap, 5) for gap in exchange.gaps],
        "pause": exchange.pause,
        "new_tokens": record.new_tokens,
        "prompt_tokens": exchange.prompt_tokens,
        "cached_tokens": exchange.cached_tokens,
        "output_tokens": exchange.output_tokens,
        "error": exchange.error,
        "detail": exchange.detail,
    }
