"""Faults against a real fleet of tiny random models, under steady mixed load.

Every answer is known beforehand from one instance alone. See `tests/fleet/chaos`.

    python benchmarks/fleet_faults.py --faults 200 --seed 1 -o benchmarks/results/fleet_faults.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from pla_serve.environment import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fleet" / "chaos"))

import campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600, help="no further fault after these")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.3, help="mean seconds between faults")
    parser.add_argument("--log", type=Path, help="keep the end of the fleet's log")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    plan = campaign.Plan(
        seed=options.seed,
        faults=options.faults,
        clients=options.clients,
        pause=options.pause,
        seconds=options.seconds,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = campaign.run(plan, Path(folder))
    content = report(plan, result)
    text = json.dumps({"environment": describe(), **content}, indent=1)
    print(text)
    if options.log is not None:
        options.log.write_text(result.log)
    if options.output is not None:
        options.output.write_text(text + "\n")
    sys.exit(bool(result.tally.problems or result.leaks))


def report(plan: campaign.Plan, result: campaign.Result) -> dict[str, Any]:
    """The numbers of one campaign."""
    tally = result.tally
    by_kind: dict[str, list[float]] = {}
    for (_, fault), seconds in zip(result.done, result.recovered, strict=True):
        by_kind.setdefault(fault.kind.value, []).append(seconds)
    return {
        "seed": plan.seed,
        "pools": " ".join(plan.pools),
        "clients": plan.clients,
        "kv_gib_each": plan.kv_gib,
        "faults_planned": plan.faults,
        "faults_done": len(result.done),
        "seconds": round(result.seconds, 1),
        "answered": tally.answered,
        "tokens": tally.tokens,
        "problems": tally.problems,
        "leaks": result.leaks,
        "connections_broken_by_the_routers_death": tally.broken,
        "refused_with_retry_after": tally.refused,
        "seconds_to_first_token": {
            "p50": round(statistics.median(tally.first_seconds), 3),
            "max": round(max(tally.first_seconds), 3),
        },
        "faults": {
            kind: {
                "count": len(seconds),
                "median_seconds_until_next": round(statistics.median(seconds), 1),
            }
            for kind, seconds in sorted(by_kind.items())
        },
    }


if __name__ == "__main__":
    main()
