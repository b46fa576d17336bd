"""Nodes of a Ray cluster are killed, one after another, under the application on Ray Serve.

The cluster is on this machine: a head, which has the API and is never killed, and nodes with an
instance each. A node that is killed is replaced by a new one. Each answer is a stream whose text is
known beforehand; one that fails, stops short or differs counts as wrong. Run by the Python of
`benchmarks/ray_venv.py`:

    .venv-ray/bin/python benchmarks/ray_faults.py --kills 50 -o benchmarks/results/ray_faults.json

The engines are stand-ins without a model, whose answers follow from the prompt. With ``--engine
tiny`` they are real ones with a tiny random model, and each answer is what one instance said before
the first kill.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from pla_serve.bench.save import write_json
from pla_serve.engine.host.process import CORE
from pla_serve.environment import describe
from pla_serve.plugins.ray.application import AppArgs, build

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.fleet.chaos.tiny_fleet import write_model  # noqa: E402
from tests.plugins.ray.cluster import Load, RayCluster, echo, ray_cluster, under_fire  # noqa: E402

FAKE = "tests.server.fake_core:FakeCore"
PROMPTS, LONGEST = 24, 600
"""With ``--engine tiny`` there are so many prompts, and the longest has so many tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3600, help="no further kill after these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=3, help="nodes with an instance")
    parser.add_argument("--least", type=int, default=2, help="instances that run before a kill")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--engine", choices=("fake", "tiny"), default="fake")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ray_cluster(options.nodes) as cluster:
        result = trial(cluster, options, str(write_model(Path(folder))))
    content = {"environment": describe(), "ray": ray.__version__, **vars(options), **result}
    content.pop("output")
    print(json.dumps(content, indent=1))
    if options.output is not None:
        write_json(options.output, content)
    if result["wrong"]:
        raise SystemExit(1)


def trial(cluster: RayCluster, options: argparse.Namespace, model: str) -> dict[str, Any]:
    """Deploy, load, kill; return what became of it."""
    args = AppArgs(
        model=model,
        instances=options.nodes,
        resources={"goes": 1},
        api_cpus=0,
        api_resources={"stays": 0.1},
        serve="--load-format dummy --threads 1",
    )
    environment = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "FAKE_PAUSE": "0.02"}
    serve.run(build(args, CORE if options.engine == "tiny" else FAKE, environment))
    expected, pool = echo, None
    if options.engine == "tiny":
        expected, pool = known_answers(cluster.url, model, options.seed)
    load = Load(cluster.url, model, expected, options.clients, pool=pool)
    began = time.monotonic()
    outcome, kills = under_fire(
        cluster, load, options.kills, options.seed, options.least, options.seconds
    )
    return {
        "killed": kills,
        "answered": outcome.answered,
        "wrong": outcome.wrong,
        "longest_pause_seconds": round(outcome.longest_pause, 2),
        "seconds": round(time.monotonic() - began, 1),
    }


def known_answers(
    url: str, model: str, seed: int
) -> tuple[Callable[[list[int], int], str], list[list[int]]]:
    """Ask for the answers to some prompts; return what gives them, and the prompts."""
    chance = random.Random(seed)
    prompts = [
        [chance.randrange(2, 500) for _ in range(chance.randint(2, LONGEST))]
        for _ in range(PROMPTS)
    ]
    known: dict[tuple[int, ...], str] = {}
    for prompt in prompts:
        fields = {"max_tokens": Load.tokens, "temperature": 0, "ignore_eos": True}
        body = {"model": model, "prompt": prompt, **fields}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()
        known[tuple(prompt)] = answer.json()["choices"][0]["text"]
    return lambda prompt, tokens: known[tuple(prompt)], prompts


if __name__ == "__main__":
    main()
