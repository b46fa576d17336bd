"""Does the simulator's fleet say what a real one does? The same arrivals through both.

The simulator's instances are machines that do not disturb each other. Real ones that share a memory
bus do, so one of the fleet's instances is calibrated (`pla-serve calibrate`) while the others have
as much to do as they will have. What the simulator leaves out, router, HTTP and client, is taken
from single prompts on the idle fleet: their median time to the first token, less what a profile of
an instance alone predicts. There must be a core for each instance, and prompts that cost several
times what router and client do for them, which run on the same cores.

    python benchmarks/fleet_agreement.py -o benchmarks/results/fleet_agreement.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fleet_real import BOUNDARY, LARGER, Ask, alone, play, poisson, real_fleet
from tiny_fleet import TinyFleet

from pla_serve.environment import describe
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.registry import parse_policy
from pla_serve.simulator.cluster import Cluster
from pla_serve.simulator.cluster_options import ClusterOptions, SimulatedTraffic
from pla_serve.simulator.machine import KnownCost, Machine, load_machine
from pla_serve.simulator.turns import OpenLoop, SimulatedTurn

SHORT, LONG = (32, 256), (768, 1536)
TYPICAL = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--instances", type=int, default=2)
    parser.add_argument("--load", type=float, default=0.5, help="of all instances")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--routings", default="round-robin,predicted")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for routing in options.routings.split(","):
            runs.append(_compare(options, routing, Path(folder) / routing))
            print(json.dumps(runs[-1]), flush=True)
    content = {
        "environment": describe(),
        "instances": options.instances,
        "load": options.load,
        "short_tokens": SHORT,
        "long_tokens": LONG,
        "runs": runs,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(content, indent=1) + "\n")


def _compare(options: argparse.Namespace, routing: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    pools = ("--mixed", str(options.instances))
    with real_fleet(pools, options.instances, folder, "--routing", routing, model=LARGER) as fleet:
        asyncio.run(play(fleet.url, poisson(9, 0.0, 6.0, [(8, *SHORT), (1, *LONG)]), "warm"))
        apart = asyncio.run(_calibrate(fleet, folder / "apart.json", {}))
        idle = asyncio.run(alone(fleet.url, TYPICAL))
        host = max(0.0, idle - KnownCost(apart.profile).prefill_seconds(TYPICAL, 0))
        neighbours = {
            other.url: _asks(options, apart, 1, f"{routing}/{other.url}")
            for other in fleet.instances()[1:]
        }
        machine = asyncio.run(_calibrate(fleet, folder / "machine.json", neighbours))
        asks = _asks(options, machine, options.instances, options.seed)
        measured = np.array(asyncio.run(play(fleet.url, asks, options.seed)))
    simulated = _simulate(asks, machine, routing, options.instances) + host
    short = np.array([ask.short for ask in asks])
    found: dict[str, Any] = {
        "routing": routing,
        "requests": len(asks),
        "host_seconds": round(host, 5),
        "coefficients": _coefficients(machine),
        "coefficients_alone": _coefficients(apart),
    }
    for name, members in (("short", short), ("long", ~short), ("all", short | ~short)):
        real = float(np.percentile(measured[members], 90))
        model = float(np.percentile(simulated[members], 90))
        found[f"{name}_p90"] = {
            "measured": round(real, 4),
            "simulated": round(model, 4),
            "ratio": round(model / real, 3),
        }
    return found


async def _calibrate(
    fleet: TinyFleet, path: Path, neighbours: Mapping[str, Sequence[Ask]]
) -> Machine:
    """The first instance, while the ``neighbours`` get their prompts."""
    key = fleet.instance_key()
    command = [sys.executable, "-m", "pla_serve", "calibrate", "-o", str(path), "--api-key", key]
    loads = [
        asyncio.create_task(play(url, asks, f"beside/{url}", key))
        for url, asks in neighbours.items()
    ]
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            *("--base-url", fleet.instances()[0].url),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        _, said = await child.communicate()
    finally:
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
    if child.returncode:
        raise SystemExit(f"calibrate failed\n{said.decode()}")
    return load_machine(str(path))


def _coefficients(machine: Machine) -> dict[str, float]:
    profile = machine.profile
    names = ("per_token", "per_attention", "per_kv", "per_sequence", "per_launch")
    return {name: getattr(profile, name) for name in names}


def _asks(options: argparse.Namespace, machine: Machine, instances: int, seed: object) -> list[Ask]:
    """Half of the work is short."""
    cost = KnownCost(machine.profile)
    work = options.load * instances / 2
    rates = [
        (work / float(np.mean([cost.prefill_seconds(n, 0) for n in range(*kind, 8)])), *kind)
        for kind in (SHORT, LONG)
    ]
    return poisson(seed, 0.0, options.seconds, rates)


def _simulate(asks: Sequence[Ask], machine: Machine, routing: str, instances: int) -> np.ndarray:
    """(requests,) seconds to first tokens."""
    cost = KnownCost(machine.profile)
    turns = [SimulatedTurn(i, ask.due, ask.tokens, 1, (), history=0) for i, ask in enumerate(asks)]
    spec = parse_policy("length-aware")
    config = PolicyConfig(boundary_tokens=BOUNDARY, layers=machine.layers)
    result = Cluster(
        ClusterOptions(instances=instances, routing=routing, boundary_tokens=BOUNDARY),
        machine,
        lambda: spec.create(config, cost),
        SimulatedTraffic(turns, OpenLoop(turns, wait=False)),
    ).run()
    return np.array([job.ttft for job in result.jobs])


if __name__ == "__main__":
    main()
