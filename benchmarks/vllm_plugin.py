"""The policy inside vLLM against vLLM alone, default and tuned: same machine, same arrivals.

    python benchmarks/vllm_plugin.py run --entries default,plugin,threshold=128,threshold=256
    python benchmarks/vllm_plugin.py run --entries default,plugin --loads chat:4:40,documents:0.2:60
    python benchmarks/vllm_plugin.py report

Open loop over HTTP. One server at a time, started for its loads and warmed up; what was measured is
appended to the output after each load, so a sweep can be made in pieces. Prompts are unique. A load
is a mix, requests a second, and seconds of arrivals.
An entry is ``default``, ``plugin``, ``preempt`` (the plugin with steps that are left between
layers), or flags of vLLM by short names (`SHORT_NAMES`), joined with +, as in
``threshold=128+budget=512``; ``plugin`` and ``preempt`` take them too, and options of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import vllm_venv
from rich import box
from rich.console import Console
from rich.table import Table

from pla_serve.bench.client import RequestTarget, one
from pla_serve.bench.load import LoadGenerator, RunResult
from pla_serve.bench.report import LONG, SHORT, Objectives, Report, summarise
from pla_serve.bench.save import write_json
from pla_serve.bench.servers import Started, free_port, started
from pla_serve.bench.text import FillerPart, WordFiller, load_tokenizer, make_filler
from pla_serve.bench.transport import HttpTransport
from pla_serve.bench.workload import BenchWorkload, WorkloadConfig, generate
from pla_serve.environment import describe
from pla_serve.traces.lengths import Lmsys

MODEL = "model"
SCHEDULER = "pla_serve.plugins.vllm.LengthAwareScheduler"
EXECUTOR = "pla_serve.plugins.vllm.PreemptibleExecutor"
OURS = {
    "plugin": ["--scheduler-cls", SCHEDULER],
    "preempt": ["--scheduler-cls", SCHEDULER, "--distributed-executor-backend", EXECUTOR],
}
"""It says which flags turn on each of this project's entries."""
SHORT_NAMES = {"threshold": "--long-prefill-token-threshold", "budget": "--max-num-batched-tokens"}
SHORT_TOKENS = 256
DRAIN_SECONDS = 90.0
WANTED = {
    "short P90, default / {}": (">=", 3.0),
    "short P90, tuned / {}": (">=", 1.3),
    "throughput, {} / default": (">=", 0.97),
    "long P99, {} / default": ("<=", 1.15),
    "ITL P99, {} / default": ("<=", 1.0),
}
console = Console()


def flags_of(entry: str) -> list[str]:
    """vLLM's flags of an entry.

    Raises:
        ValueError: it has an unknown name.
    """
    name, *rest = entry.split("+")
    flags = list(OURS.get(name, []))
    own: dict[str, object] = {}
    for part in rest if name == "default" or name in OURS else [name, *rest]:
        key, equals, value = part.partition("=")
        if key in SHORT_NAMES and equals:
            flags += [SHORT_NAMES[key], value]
        elif name in OURS and equals:
            own[key] = json.loads(value)
        else:
            raise ValueError(f"{part!r} in {entry!r} is not one of {', '.join(SHORT_NAMES)}")
    if own:
        flags += ["--additional-config", json.dumps({"pla_serve": own})]
    return flags


@contextmanager
def served(python: Path, folder: Path, entry: str, common: list[str]) -> Iterator[Started]:
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    source = Path(__file__).resolve().parents[1] / "src"
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with started(
        [*command, *common, *flags_of(entry)],
        f"http://127.0.0.1:{port}",
        ready="/health",
        environment=os.environ | settings,
    ) as server:
        yield server


class Load(NamedTuple):
    """``chat+documents``, ``chat`` or ``documents``; requests a second; seconds of arrivals."""

    mix: str
    rate: float
    seconds: float


def loads_of(text: str) -> list[Load]:
    """Comma-separated ``mix:rate:seconds``."""
    parts = [part.split(":") for part in text.split(",")]
    return [Load(mix, float(rate), float(seconds)) for mix, rate, seconds in parts]


def make_workload(load: Load, options: argparse.Namespace) -> BenchWorkload:
    """One turn each, so that nobody waits for an answer."""
    return generate(
        WorkloadConfig(
            mix=load.mix,
            requests=max(1, round(load.rate * load.seconds)),
            rate=load.rate,
            seed=options.seed,
            document_share=options.document_share,
            mean_turns=1,
            max_turns=1,
            message=Lmsys(high=SHORT_TOKENS - 40),  # the chat template takes some
            output_tokens=(8, 16),
        )
    )


async def measure(
    url: str, filler: WordFiller, workload: BenchWorkload, seconds: float
) -> RunResult:
    transport = HttpTransport(url)
    clock = asyncio.get_running_loop().time
    try:
        generator = LoadGenerator(transport, RequestTarget(MODEL, "chat"), filler, clock=clock)
        return await generator.run(workload, seconds + DRAIN_SECONDS)
    finally:
        await transport.close()


async def warm_up(url: str, filler: WordFiller) -> None:
    """First answers compile things, and are slow."""
    transport = HttpTransport(url)
    try:
        for tokens in (16, 64, 200, 1024, 3000):
            ids = filler.ids([FillerPart(f"warm{tokens}", tokens)])
            await one(transport, RequestTarget(MODEL, "completions"), ids, 4)
    finally:
        await transport.close()


def run(options: argparse.Namespace) -> None:
    from pla_serve.engine.loading import ConsoleProgress, resolve

    folder = resolve(options.model, progress=ConsoleProgress()).folder
    python = options.python or vllm_venv.prepare(options.venv, options.torch_index)
    tokenizer = load_tokenizer(folder)
    for entry in options.entries.split(","):
        began = time.monotonic()
        filler = make_filler(f"{options.seed}/{entry}/{time.time_ns()}", tokenizer)
        with served(python, folder, entry, options.common) as server:
            asyncio.run(warm_up(server.url, filler))
            console.print(f"{entry} is up after {time.monotonic() - began:.0f} s", style="dim")
            for load in loads_of(options.loads):
                workload = make_workload(load, options)
                filler = make_filler(f"{options.seed}/{entry}/{time.time_ns()}", tokenizer)
                result = asyncio.run(measure(server.url, filler, workload, load.seconds))
                report = summarise(result, Objectives(SHORT_TOKENS))
                console.print(f"{entry}, {load.mix}: {headline(report)}", highlight=False)
                append(options, entry, workload, report, result, python)


def append(
    options: argparse.Namespace,
    entry: str,
    workload: BenchWorkload,
    report: Report,
    result: RunResult,
    python: Path,
) -> None:
    saved = json.loads(options.output.read_text()) if options.output.exists() else {"runs": []}
    saved["vllm"] = {"version": vllm_venv.version(python)}
    saved["runs"].append(
        {
            "entry": entry,
            "flags": [*options.common, *flags_of(entry)],
            "workload": workload.parameters,
            "environment": describe(),
            "report": asdict(report),
            "ttft": [
                [round(r.due, 3), r.new_tokens, None if r.ttft is None else round(r.ttft, 4)]
                for r in result.records
            ],
        }
    )
    saved["summary"] = summary(saved["runs"])
    write_json(options.output, saved)


def headline(report: Report) -> str:
    parts = [f"{report.classes['all'].requests_per_second:.2f} req/s"]
    for name in (SHORT, LONG):
        ttft = report.classes[name].ttft
        if ttft is not None:
            parts.append(f"{name} {ttft.p50:.2f} / {ttft.p90:.2f} / {ttft.p99:.2f} s")
    return ", ".join([*parts, *report.warnings])


def numbers(entry: dict) -> dict[str, float]:
    """What is compared of one run."""
    classes = entry["report"]["classes"]
    found = {"req/s": classes["all"]["requests_per_second"]}
    for name in (SHORT, LONG):
        for metric in ("ttft", "itl"):
            values = classes[name][metric]
            for rank in ("p50", "p90", "p99"):
                if values:
                    found[f"{name} {metric} {rank}"] = values[rank]
    return found


def summary(runs: list[dict]) -> list[dict]:
    """Medians by workload and entry, and the comparisons that were promised."""
    groups: dict[str, dict[str, list[dict[str, float]]]] = {}
    for entry in runs:
        parameters = entry["workload"]
        key = f"{parameters['workload']}, {parameters['rate']} req/s"
        groups.setdefault(key, {}).setdefault(entry["entry"], []).append(numbers(entry))
    found = []
    for workload, entries in groups.items():
        medians = {
            entry: {name: statistics.median(row[name] for row in rows) for name in rows[0]}
            for entry, rows in entries.items()
        }
        counts = {entry: len(rows) for entry, rows in entries.items()}
        found.append(
            {
                "workload": workload,
                "runs": counts,
                "medians": medians,
                "claims": claims(medians),
            }
        )
    return found


def claims(medians: dict[str, dict[str, float]]) -> dict[str, dict[str, object]]:
    """Ratios to what was promised, for a workload with both classes. The tuned server is the one
    of the sweep with the lowest short P90, whatever it did to the others."""
    default = medians.get("default")
    key, tail, gap = "short ttft p90", "long ttft p99", "short itl p99"
    tuned = {name: row for name, row in medians.items() if name.split("=")[0] in SHORT_NAMES}
    note = min(tuned, key=lambda name: tuned[name][key]) if tuned else None
    found: dict[str, dict[str, object]] = {}
    for name in OURS:
        mine = medians.get(name)
        if not mine or not default or key not in mine or tail not in mine:
            continue
        ratios = {
            "short P90, default / {}": default[key] / mine[key],
            "throughput, {} / default": mine["req/s"] / default["req/s"],
            "long P99, {} / default": mine[tail] / default[tail],
        }
        if gap in mine and gap in default:
            ratios["ITL P99, {} / default"] = mine[gap] / default[gap]
        if note:
            ratios["short P90, tuned / {}"] = tuned[note][key] / mine[key]
        for kind, ratio in ratios.items():
            sign, bound = WANTED[kind]
            kept = ratio >= bound if sign == ">=" else ratio <= bound
            found[kind.format(name)] = {"ratio": ratio, "wanted": f"{sign} {bound}", "kept": kept}
        if note:
            found[f"short P90, tuned / {name}"]["tuned"] = note
    return found


def report(options: argparse.Namespace) -> None:
    runs = json.loads(options.output.read_text())["runs"]
    for part in summary(runs):
        table = Table(title=part["workload"], box=box.SIMPLE_HEAD, title_justify="left")
        names = list(next(iter(part["medians"].values())))
        for head in ("", "runs", *names):
            table.add_column(head, justify="left" if not head else "right")
        for entry, row in part["medians"].items():
            cells = [f"{row[name]:.2f}" for name in names]
            table.add_row(entry, str(part["runs"][entry]), *cells)
        console.print(table)
        for name, claim in part["claims"].items():
            console.print(f"{name}: {claim}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--entries", default="default,plugin")
    parser.add_argument("--loads", default="chat+documents:1.1:75")
    parser.add_argument("--document-share", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--venv", type=Path, default=Path(".venv-vllm"), help="made if missing")
    parser.add_argument("--python", type=Path, help="of an environment with vLLM that is there")
    parser.add_argument("--torch-index", help="as of the Makefile, for that environment")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/vllm-plugin.json"))
    parser.add_argument(
        "--common",
        type=str.split,
        default=["--dtype", "float32", "--max-model-len", "8192", "--enable-prompt-tokens-details"],
        help="flags of every server, as one word",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that servers end, too
    {"run": run, "report": report}[options.what](options)


if __name__ == "__main__":
    main()
