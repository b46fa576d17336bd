"""From the command to the first token of a request that waits, and memory at rest.

    python benchmarks/start.py                                # about five minutes
    python benchmarks/start.py --rounds 1 --dtypes float32

Each server is started with files in the page cache, kernels compiled and its profile stored: one
start before the measured ones sees to that. A client asks for one token from the moment of the
command on, again and again until the server answers. Then the server rests, and the memory of its
processes is read: resident, in which shared pages count for each process, and proportional, in
which they count once. The imports of the engine's process are timed apart. llama-server takes part
where `llama_cpp.py` has built it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import llama_cpp

from pla_serve.bench.save import write_json
from pla_serve.bench.servers import free_port
from pla_serve.engine.loading.cache import cache_root
from pla_serve.environment import describe, usable_cores

MODEL = "smollm2"
FORMATS = {"float32": "F32", "bfloat16": "BF16"}
RETRY_SECONDS = 0.01
LONGEST_START = 120.0
REST_SECONDS = 20.0
"""Time that a server rests before its memory is read: a warm-up behind requests is over then."""
IMPORTS = "import pla_serve.engine.build.engine"


@dataclass(frozen=True, slots=True)
class Side:
    """A server, and the flags that make it what it is."""

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a server."""

    first_token: float
    """Seconds from the command to the first token."""
    resident: float
    """MiB of all its processes at rest."""
    proportional: float
    """The same, pages that processes share counted once."""
    phases: list[tuple[float, str]] = field(default_factory=list)
    """Seconds from the command to each line of the log, and the line."""


def sides(dtype: str, flags: Sequence[str]) -> list[Side]:
    ours = (sys.executable, "-m", "pla_serve", "serve", "--quantization", "none")
    ours += ("--dtype", dtype, "--served-model-name", MODEL, *flags)
    found = [
        Side("pla-serve", ours),
        Side("pla-serve, warm-up first", (*ours, "--no-stored-profile")),
    ]
    program = cache_root() / f"llama.cpp-{llama_cpp.VERSION}" / "llama-server"
    if program.exists():
        file = llama_cpp.model_file(program.parent, FORMATS[dtype])
        words = (str(program), "--model", str(file), "--alias", MODEL, "--host", "127.0.0.1")
        words += ("--threads", str(usable_cores()), "--no-webui")
        found.append(Side("llama-server", words))
    return found


def start(side: Side) -> Start:
    port = free_port()
    began = time.perf_counter()
    process = subprocess.Popen(
        [*side.command, "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    phases: list[tuple[float, str]] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            if side.name.startswith("pla-serve"):
                text = re.sub(r"/\S+/", "", line.strip())  # without folders
                phases.append((round(time.perf_counter() - began, 3), text))

    reader = threading.Thread(target=listen)
    reader.start()
    try:
        first_token = wait_for_token(process, port, began)
        time.sleep(REST_SECONDS)
        resident, proportional = memory(process.pid)
    finally:
        process.terminate()
        process.wait()
        reader.join()
    return Start(first_token, resident, proportional, phases)


def wait_for_token(process: subprocess.Popen[str], port: int, began: float) -> float:
    """Return the seconds from ``began`` until the server has answered with a token."""
    body = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 1, "temperature": 0})
    while (passed := time.perf_counter() - began) < LONGEST_START:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        connection = HTTPConnection("127.0.0.1", port, timeout=LONGEST_START - passed)
        try:
            connection.request(
                "POST", "/v1/completions", body, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                return time.perf_counter() - began
        except (OSError, HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(RETRY_SECONDS)
    raise TimeoutError(f"no token within {LONGEST_START:.0f} s")


def memory(pid: int) -> tuple[float, float]:
    """Return resident and proportional MiB of a process and all its descendants."""
    resident = proportional = 0.0
    waiting = [pid]
    while waiting:
        folder = Path("/proc", str(waiting.pop()))
        try:
            text = (folder / "smaps_rollup").read_text()
            for task in (folder / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except OSError:
            continue  # it has ended
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE))
        resident += int(sizes["Rss"]) / 1024
        proportional += int(sizes["Pss"]) / 1024
    return round(resident, 1), round(proportional, 1)


def imports() -> dict[str, float]:
    """Return the seconds of a process that imports what the engine's process does, and of torch's
    part of it."""
    seconds = {}
    for name, code in (("engine", IMPORTS), ("torch", "import torch"), ("python", "pass")):
        times = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times.append(time.perf_counter() - began)
        seconds[name] = round(statistics.median(times), 3)
    return seconds


def compare(dtype: str, rounds: int, flags: Sequence[str]) -> dict[str, object]:
    found = sides(dtype, flags)
    for side in found:
        start(side)  # files into the cache, and the profile onto the disk
    starts: dict[str, list[Start]] = {side.name: [] for side in found}
    for _ in range(rounds):
        for side in found:
            starts[side.name].append(start(side))
    return {
        name: {
            "first_token_seconds": statistics.median(one.first_token for one in each),
            "first_token_seconds_each": [round(one.first_token, 3) for one in each],
            "resident_mib": statistics.median(one.resident for one in each),
            "proportional_mib": statistics.median(one.proportional for one in each),
            "log_of_the_last": each[-1].phases,
        }
        for name, each in starts.items()
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", type=str.split, default=[], help="more flags of pla-serve")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/start.json"))
    return parser.parse_args()


def main() -> None:
    options = parse()
    result: dict[str, object] = {"environment": describe(), "imports_seconds": imports()}
    result["dtypes"] = {
        dtype: compare(dtype, options.rounds, options.ours) for dtype in options.dtypes.split(",")
    }
    write_json(options.output, result)
    print(json.dumps(result["dtypes"], indent=1))


if __name__ == "__main__":
    main()
