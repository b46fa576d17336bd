"""Faults against a real fleet of tiny random models, under steady mixed load.

Every answer is known beforehand from one instance alone. See `tests/fleet/chaos`.

A campaign ends with its list of faults or its time, whichever comes first. A result may be made of
several, each on a fleet of its own:

    python benchmarks/fleet_faults.py --seed 1 --seconds 420 -o benchmarks/results/fleet_faults.json
    python benchmarks/fleet_faults.py --seed 2 --seconds 420 -o ... --more
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fleet.chaos import campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600, help="no further fault after these")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.3, help="mean seconds between faults")
    parser.add_argument("--log", type=Path, help="keep the end of the fleet's log")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--more", action="store_true", help="add to what the output has already")
    options = parser.parse_args()
    try:
        earlier = read_campaigns(options.output, options.seed) if options.more else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    plan = campaign.Plan(
        seed=options.seed,
        faults=options.faults,
        clients=options.clients,
        pause=options.pause,
        seconds=options.seconds,
    )
    with tempfile.TemporaryDirectory() as folder:
        result = campaign.run(plan, Path(folder))
    campaign_content = {"environment": describe(), **report(plan, result)}
    campaigns = [*earlier, campaign_content]
    print(json.dumps(campaign_content, indent=1))
    if options.log is not None:
        options.log.write_text(result.log)
    if options.output is not None:
        content = {"total": total(campaigns), "campaigns": campaigns}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(bool(result.tally.problems or result.leaks))


def read_campaigns(path: Path | None, seed: int) -> list[dict[str, Any]]:
    """Those that were recorded before.

    Raises:
        OSError: there is no such file.
        ValueError: nothing to add to, or the same faults once more.
    """
    if path is None:
        raise ValueError("--more needs --output, the result to add to")
    campaigns: list[dict[str, Any]] = json.loads(path.read_text()).get("campaigns", [])
    if not campaigns:
        raise ValueError(f"{path} has no campaigns to add to; leave --more out")
    if any(each["seed"] == seed for each in campaigns):
        raise ValueError(f"{path} has seed {seed} already; give another --seed")
    return campaigns


SUMS = (
    "faults_done",
    "seconds",
    "answered",
    "tokens",
    "connections_broken_by_the_routers_death",
    "refused_with_retry_after",
)


def total(campaigns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all campaigns."""
    kinds = sorted({kind for each in campaigns for kind in each["faults"]})
    return {
        **{name: round(sum(each[name] for each in campaigns), 1) for name in SUMS},
        "problems": [problem for each in campaigns for problem in each["problems"]],
        "leaks": [leak for each in campaigns for leak in each["leaks"]],
        "faults": {
            kind: sum(each["faults"].get(kind, {"count": 0})["count"] for each in campaigns)
            for kind in kinds
        },
    }


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
        "given_up_as_two_instances_were_killed_under_it": len(tally.given_up),
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
