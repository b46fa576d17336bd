"""Does the simulator say what the engine does? The same arrivals through both.

    pla-serve calibrate -o cpu.json                                    # of an idle server, once
    pla-serve bench --compare fcfs,hrrn,length-aware --idle --records -o run
    python benchmarks/agreement.py run.json cpu.json -o benchmarks/results/agreement.json

Every request of the recorded runs goes through the simulated instance of its policy with the
arrival, new tokens, history and answer that the real one had. Turns of a session come when they
came there, so that an error does not feed on itself. What the simulator leaves out, the client and
the API process, is taken from the idle server: its TTFT less what the profile predicts for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from pla_serve.environment import describe
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.registry import create_policy
from pla_serve.simulator.instance import SimulatedInstance
from pla_serve.simulator.machine import KnownCost, Machine, load_machine
from pla_serve.simulator.request import SimulatedRequest
from pla_serve.simulator.solo import serve

SHORT = 256
"""New tokens."""
QUANTILES = (50, 90)

Record = dict[str, Any]


def main(
    run: Annotated[Path, Parameter(help="Result of pla-serve bench --compare, with --records.")],
    machine: Annotated[str, Parameter(help="A machine profile of the same server.")],
    /,
    *,
    output: Annotated[Path, Parameter(alias="-o")],
) -> None:
    """Compare measured and simulated times to first tokens."""
    recorded = json.loads(run.read_text())
    profile = load_machine(machine)
    rows = [
        _compare(
            entry["entry"],
            [record for record in entry["records"] if record["error"] is None],
            entry["idle_ttft"]["p50"],
            profile,
        )
        for entry in recorded["runs"]
    ]
    content = {
        "environment": describe(),
        "measured": {"environment": recorded["environment"], "parameters": recorded["parameters"]},
        "machine": json.loads(Path(machine).read_text()),
        "runs": rows,
    }
    output.write_text(json.dumps(content, indent=1) + "\n")
    Console().print(_table(rows))


def _compare(policy: str, records: list[Record], idle: float, machine: Machine) -> dict[str, Any]:
    """Percentiles of both by class, and their ratio; ``idle``: median TTFT of shorts alone."""
    records = sorted(records, key=lambda record: record["due"])
    measured = np.array([record["first"] - record["due"] for record in records])
    short = np.array([_new_tokens(record) <= SHORT for record in records])
    cost = KnownCost(machine.profile)
    alone = [
        cost.prefill_seconds(_new_tokens(record), record["cached_tokens"] or 0)
        for record in records
        if _new_tokens(record) <= SHORT
    ]
    host = max(0.0, idle - float(np.median(alone)))
    simulated = _simulate(policy, records, machine) + host
    found: dict[str, Any] = {"policy": policy, "requests": len(records), "host_seconds": host}
    for name, members in (("short", short), ("long", ~short)):
        for quantile in QUANTILES:
            real = float(np.percentile(measured[members], quantile))
            model = float(np.percentile(simulated[members], quantile))
            found[f"{name}_p{quantile}"] = {
                "measured": real,
                "simulated": model,
                "ratio": model / real,
            }
    return found


def _simulate(policy: str, records: list[Record], machine: Machine) -> np.ndarray:
    """(requests,) seconds to first tokens, in the order of ``records``."""
    cost = KnownCost(machine.profile)
    jobs = [
        SimulatedRequest(
            id=str(number),
            arrival=record["due"],
            new_tokens=_new_tokens(record),
            history=record["cached_tokens"] or 0,
            output_tokens=record["output_tokens"],
        )
        for number, record in enumerate(records)
    ]
    instance = SimulatedInstance(
        create_policy(policy, PolicyConfig(), cost),
        cost,
        machine.layers,
        lambda job, now: None,
        lambda job, now: None,
        decodes=True,
    )
    serve(instance, jobs)
    return np.array([job.ttft for job in jobs])


def _new_tokens(record: Record) -> int:
    return int(record["prompt_tokens"] - (record["cached_tokens"] or 0))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="TTFT in seconds: measured, simulated, their ratio")
    table.add_column("policy")
    names = [f"{name}_p{quantile}" for name in ("short", "long") for quantile in QUANTILES]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        cells = [
            f"{row[name]['measured']:.3g}  {row[name]['simulated']:.3g}  {row[name]['ratio']:.2f}"
            for name in names
        ]
        table.add_row(row["policy"], *cells)
    return table


if __name__ == "__main__":
    cyclopts.run(main)
