"""What a router costs: ours and sglang-router before the same fake instances, and none at all.

The instances (`routers/fake_instance.py`) cost next to nothing and give tokens at a steady pace.
Each lap measures every router in turn, each in three ways:

latency     Poisson arrivals, streamed answers of 8 tokens: seconds to the first byte of the body
            and to the last one. What is added is the difference to the instance itself.
requests    closed loop, one token, not streamed: requests for each second of the router's CPU time.
streams     closed loop, 100 tokens streamed: tokens for each second of the router's CPU time.

Client, routers and instances share the machine's cores, so rates by the wall clock say little;
those by CPU time of the router's process are what one core would do.

    python benchmarks/router.py -o benchmarks/results/router.json
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from routers.others import SGLANG_ROUTER, prepare, sglang_router
from routers.raw_client import Times, closed_loop, open_loop

from pla_serve.bench.servers import Started, free_port, started
from pla_serve.environment import describe

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
INSTANCES = 2
DIRECT, OURS, SGLANG = "direct", "pla-serve route", "sglang-router cache_aware"


@contextmanager
def fake_instances() -> Iterator[tuple[list[int], int]]:
    """Their OpenAI ports (links are on the ports behind), and the process that serves them."""
    ports = [free_port() for _ in range(INSTANCES)]
    script = Path(__file__).parent / "routers" / "fake_instance.py"
    words = [word for port in ports for word in ("--port", str(port))]
    process = subprocess.Popen([sys.executable, str(script), *words], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield ports, process.pid
    finally:
        process.kill()
        process.wait()


@contextmanager
def ours(ports: list[int]) -> Iterator[Started]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        port = free_port()
        command = [
            *(sys.executable, "-m", "pla_serve", "route", folder, "--load-format", "dummy"),
            *("--served-model-name", "fake", "--port", str(port), "--log-level", "warning"),
            *(word for each in ports for word in ("--instance", f"http://127.0.0.1:{each + 1}")),
        ]
        with started(command, f"http://127.0.0.1:{port}") as server:
            yield server


@contextmanager
def sglang(python: Path, ports: list[int]) -> Iterator[Started]:
    port = free_port()
    workers = [f"http://127.0.0.1:{each}" for each in ports]
    command = sglang_router(python, port, workers, "cache_aware")
    with started(command, f"http://127.0.0.1:{port}", ready="/health") as server:
        yield server


def cpu_seconds(pid: int) -> float:
    """Of a process and its children, so far."""
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(sum(member.cpu_times()[:2]) for member in family)


def port_of(server: Started) -> int:
    return int(server.url.rpartition(":")[2])


def percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99))
    return {"p50_ms": p50 * 1e3, "p90_ms": p90 * 1e3, "p99_ms": p99 * 1e3}


def measured(times: Times, cpu: float) -> dict[str, Any]:
    count = len(times.last)
    return {
        "requests": count,
        "errors": times.errors,
        "seconds": times.seconds,
        "cpu_seconds": cpu,
        "first": percentiles(times.first),
        "last": percentiles(times.last),
        "requests_per_second": count / times.seconds,
        "requests_per_core": count / cpu if cpu else None,
        "tokens_per_second": times.tokens / times.seconds,
        "tokens_per_core": times.tokens / cpu if cpu else None,
    }


def lap(
    routers: dict[str, tuple[int, int]], options: argparse.Namespace, seed: int
) -> list[dict[str, Any]]:
    phases = {
        "latency": lambda port: open_loop(
            port, options.rate, options.seconds, options.words, 8, seed
        ),
        "requests": lambda port: closed_loop(
            port, 16, options.seconds / 2, options.words, 1, False, seed
        ),
        "streams": lambda port: closed_loop(port, 64, options.seconds / 2, 20, 100, True, seed),
    }
    rows = []
    for phase, run in phases.items():
        for name, (port, pid) in routers.items():
            before = cpu_seconds(pid)
            times = uvloop.run(run(port))
            row = {"router": name, "phase": phase, "seed": seed}
            row |= measured(times, cpu_seconds(pid) - before)
            print(
                f"{phase:9s} {name:27s} first {row['first']['p50_ms']:7.2f} "
                f"{row['first']['p99_ms']:7.2f} ms, {row['requests_per_core']:8.0f} requests, "
                f"{row['tokens_per_core']:8.0f} tokens a core, {row['errors']} errors",
                flush=True,
            )
            rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over laps, and what is added to direct access."""

    def middle(name: str, phase: str, *path: str) -> float:
        found = []
        for row in rows:
            if row["router"] == name and row["phase"] == phase:
                value: Any = row
                for key in path:
                    value = value[key]
                found.append(float(value))
        return float(np.median(found))

    result: dict[str, Any] = {}
    for name in (OURS, SGLANG):
        added = {
            f"added_{part}_{key}": middle(name, "latency", part, key)
            - middle(DIRECT, "latency", part, key)
            for part in ("first", "last")
            for key in ("p50_ms", "p99_ms")
        }
        result[name] = {
            **added,
            "requests_per_core": middle(name, "requests", "requests_per_core"),
            "tokens_per_core": middle(name, "streams", "tokens_per_core"),
        }
    result["ratio"] = {
        key: result[OURS][key] / result[SGLANG][key]
        for key in ("requests_per_core", "tokens_per_core")
    }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the latency phase")
    parser.add_argument("--words", type=int, default=200, help="in a prompt")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache/pla-serve-routers")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    python = prepare(options.venvs, SGLANG_ROUTER)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        ports, pid = stack.enter_context(fake_instances())
        servers = {
            OURS: stack.enter_context(ours(ports)),
            SGLANG: stack.enter_context(sglang(python, ports)),
        }
        routers = {DIRECT: (ports[0], pid)}
        routers |= {name: (port_of(server), server.pid) for name, server in servers.items()}
        for number in range(options.laps):
            order = dict(reversed(routers.items())) if number % 2 else routers
            rows += lap(order, options, number)
    result = {
        "benchmark": "router",
        **describe(),
        "sglang_router": SGLANG_ROUTER,
        "instances": INSTANCES,
        "words": options.words,
        "rate": options.rate,
        "summary": summary(rows),
        "rows": rows,
    }
    print(json.dumps(result["summary"], indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
