"""Does every query of the dashboard and of the alerts find data in a real Prometheus?

    apt-get download prometheus && dpkg-deb -x prometheus_*.deb /tmp/prometheus
    python benchmarks/monitoring.py --prometheus /tmp/prometheus/usr/bin/prometheus \
        -o benchmarks/results/monitoring.json

Starts a fleet of a tiny random model, puts load on it, has Prometheus scrape router and instances
with the configuration and the alerts of ``deploy/prometheus``, and asks each query of
``deploy/grafana/pla-serve.json``, and each alert without its threshold. Those that return nothing
are listed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import httpx
import yaml

from pla_serve.bench.servers import free_port
from pla_serve.environment import describe

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.fleet.chaos.tiny_fleet import (  # noqa: E402
    METRICS_KEY,
    VOCABULARY,
    TinyFleet,
    start_fleet,
    write_model,
)

DASHBOARD = ROOT / "deploy" / "grafana" / "pla-serve.json"
PROMETHEUS = ROOT / "deploy" / "prometheus"
VARIABLES = {"$__rate_interval": "30s", "$model": ".*", "$job": "pla-serve"}
THRESHOLD = re.compile(r" (==|>|<) [0-9.]+$")
LOAD_SECONDS = 40.0


def dashboard_queries() -> dict[str, str]:
    """Return the queries of all panels, by panel title and letter, with the variables filled in."""
    found: dict[str, str] = {}
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            found[f"{panel['title']} {target['refId']}"] = query
    return found


def alert_queries() -> dict[str, str]:
    """Return what each alert watches, by its name: its expression without the threshold."""
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    return {rule["alert"]: THRESHOLD.sub("", rule["expr"]) for rule in rules}


def write_config(folder: Path, fleet: TinyFleet) -> Path:
    """Write the project's configuration with the addresses and the key of this fleet."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    key = folder / "key"
    key.write_text(METRICS_KEY)
    targets = {
        "pla-serve-router": [f"127.0.0.1:{fleet.port}"],
        "pla-serve": [f"127.0.0.1:{instance.port}" for instance in fleet.instances()],
    }
    for job in config["scrape_configs"]:
        job["static_configs"][0]["targets"] = targets[job["job_name"]]
        job["authorization"] = {"credentials_file": str(key)}
    config["global"]["scrape_interval"] = "1s"
    config["rule_files"] = [str(PROMETHEUS / "alerts.yml")]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def running_prometheus(binary: Path, folder: Path, fleet: TinyFleet) -> Iterator[str]:
    """Run Prometheus and give its URL."""
    port = free_port()
    command = [
        str(binary),
        f"--config.file={write_config(folder, fleet)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    child = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 30
        while not _answers(f"{url}/-/ready"):
            if child.poll() is not None or time.monotonic() > end:
                raise RuntimeError("Prometheus does not start")
            time.sleep(0.1)
        yield url
    finally:
        child.terminate()
        child.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


async def load(url: str, seconds: float, workers: int = 6) -> int:
    """Send short and long prompts, some with a shared beginning, and one that is refused."""
    end, sent = time.monotonic() + seconds, 0
    shared = [1 + i % 200 for i in range(300)]

    async def work(number: int, client: httpx.AsyncClient) -> None:
        nonlocal sent
        random = Random(number)
        while time.monotonic() < end:
            length = random.choice((8, 30, 60, 600, 1500))
            prompt = [random.randrange(1, VOCABULARY) for _ in range(length)]
            if random.random() < 0.3:
                prompt = shared + prompt[:20]
            body = {"prompt": prompt, "max_tokens": 24, "ignore_eos": True, "stream": True}
            if random.random() < 0.05:
                body["max_tokens"] = 10**6
            await client.post(f"{url}/v1/completions", json=body)
            sent += 1

    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        await asyncio.gather(*(work(number, client) for number in range(workers)))
    return sent


def ask(url: str, query: str) -> int:
    """Return the number of series with a number in the answer; -1 if Prometheus refuses."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}, trust_env=False)
    if answer.status_code != 200:
        return -1
    result: list[dict[str, Any]] = answer.json()["data"]["result"]
    return sum(not math.isnan(float(series["value"][1])) for series in result)


def main() -> int:
    """Try all queries, print and record what they return."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--prometheus", type=Path, required=True, help="its binary")
    parser.add_argument("--seconds", type=float, default=LOAD_SECONDS, help="of load")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    queries = dashboard_queries() | alert_queries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder / "model")
        pools, words = ["--short", "1", "--long", "1"], ["--kv-cache-gib", "0.05"]
        with (
            start_fleet(model, pools, folder / "fleet.log", *words, count=2) as fleet,
            running_prometheus(arguments.prometheus, folder, fleet) as url,
        ):
            sent = asyncio.run(load(fleet.url, arguments.seconds))
            found = {title: ask(url, query) for title, query in queries.items()}
    empty = [title for title, count in found.items() if count <= 0]
    print(f"{len(found)} queries after {sent} requests; without data: {', '.join(empty) or 'none'}")
    if arguments.output is not None:
        record = {"environment": describe(), "requests": sent, "series": found}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if empty else 0


if __name__ == "__main__":
    sys.exit(main())
