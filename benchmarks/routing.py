"""Routers before the same instances: short P90, SLO violations and throughput under the same load.

Real instances (small random models, one thread each) stay up; routers take turns before them
(A B C ..., A B C ...), each with the same arrivals and sizes and with prompts of its own, so that
nobody finds what another one left in a cache. The load is open: chat sessions of several turns and
documents, at a share of what the cores can do. The objectives are multiples of what an idle
instance takes. Our router talks to the instances over its own protocol, the others to their OpenAI
port. Instances have roles, short or long, which only class pools heed. More instances than cores
slow each other down, whatever the routing. With ``--roles short,long`` there is one for each of two
cores; with ``--stand-in MACHINE`` each waits for as long as an accelerator would take
(`routers/stand_in.py`), so that any number of them have one each.

sglang-router's `bucket` is a policy for the prefill stage of a PD deployment of SGLang servers
(its flag exists for that only), so it does not apply here.

    python benchmarks/routing.py -o benchmarks/results/routing.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from routers.envoy import ENVOY, envoy
from routers.others import SGLANG_ROUTER, VLLM_ROUTER, prepare, sglang_router, vllm_router

from pla_serve.bench.calibrate import Probe, idle_ttft, measure_costs, warm_up
from pla_serve.bench.client import RequestTarget
from pla_serve.bench.load import LoadGenerator
from pla_serve.bench.report import Objectives, Report, summarise
from pla_serve.bench.servers import free_port, started
from pla_serve.bench.text import WordFiller
from pla_serve.bench.transport import HttpTransport
from pla_serve.bench.workload import BenchWorkload, WorkloadConfig, generate
from pla_serve.environment import describe

MODEL = "tiny"
VOCABULARY = 512
CONTEXT = 32768
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""But for its width."""
SLO_FACTOR = 5.0
"""Objectives, in multiples of the mean time of an idle instance."""
SHORT_TOKENS = 256
STAND_IN = str(Path(__file__).parent / "routers" / "stand_in.py")
OURS = ("auto", "predicted", "round-robin", "least-loaded")


@dataclass(frozen=True, slots=True)
class Router:
    """One router to measure."""

    name: str
    command: list[str]
    """The port is appended."""
    ready: str

    @contextmanager
    def up(self) -> Iterator[str]:
        port = free_port()
        command = [word.replace("PORT", str(port)) for word in self.command]
        environment = {**os.environ, "RUST_LOG": "error"}
        url = f"http://127.0.0.1:{port}"
        with started(command, url, ready=self.ready, environment=environment, seconds=120):
            yield url


@dataclass(frozen=True, slots=True)
class PickingEnvoy:
    """Starts an Envoy that asks one of our routers, or goes by its own least request."""

    name: str
    router: list[str] | None
    """This command starts the router that it asks; PORT and PICKER in it stand for ports."""
    python: Path
    folder: Path
    urls: list[str]

    @contextmanager
    def up(self) -> Iterator[str]:
        with ExitStack() as stack:
            picker = None
            if self.router is not None:
                port, picker = free_port(), free_port()
                ports = {"PORT": str(port), "PICKER": str(picker)}
                command = [ports.get(word, word) for word in self.router]
                stack.enter_context(started(command, f"http://127.0.0.1:{port}", seconds=120))
            server = stack.enter_context(envoy(self.python, self.folder, self.urls, picker))
            yield server.url


AnyRouter = Router | PickingEnvoy


def routers(folder: Path, urls: list[str], venvs: Path, names: list[str]) -> list[AnyRouter]:
    """All that can be measured, in the order of ``names``."""
    links = [word for url in urls for word in ("--instance", url)]
    found: dict[str, AnyRouter] = {}
    ours = [
        *(sys.executable, "-m", "pla_serve", "route", str(folder), "--load-format", "dummy"),
        *("--served-model-name", MODEL, "--log-level", "warning", "--port", "PORT", *links),
    ]
    for routing in OURS:
        command = [*ours, "--routing", routing]
        found[f"pla-serve {routing}"] = Router(f"pla-serve {routing}", command, "/ready")
    for name in ("envoy picker", "envoy least_request"):
        if name in names:
            asks = [*ours, "--picker-port", "PICKER"] if name == "envoy picker" else None
            found[name] = PickingEnvoy(name, asks, prepare(venvs, ENVOY), folder, urls)
    for policy in ("cache_aware", "round_robin"):
        name = f"sglang-router {policy}"
        if name in names:
            python = prepare(venvs, SGLANG_ROUTER)
            command = sglang_router(python, 0, urls, policy)
            found[name] = Router(name, _with_port(command), "/health")
        name = f"vllm-router {policy}"
        if name in names:
            python = prepare(venvs, VLLM_ROUTER)
            command = vllm_router(python, 0, urls, policy)
            found[name] = Router(name, _with_port(command), "/health")
    return [found[name] for name in names]


def _with_port(command: list[str]) -> list[str]:
    command[command.index("--port") + 1] = "PORT"
    command[command.index("--prometheus-port") + 1] = str(free_port())
    return command


@contextmanager
def instances(
    folder: Path, roles: list[str], stand_in: str | None, flags: list[str]
) -> Iterator[list[str]]:
    """URLs of one for each role; with a model, or with a wait for what this machine would take."""
    program = ["-m", "pla_serve", "serve"] if stand_in is None else [STAND_IN, stand_in]
    with ExitStack() as stack:
        urls = []
        for role in roles:
            port = free_port()
            command = [
                *(sys.executable, *program, str(folder), "--load-format", "dummy"),
                *("--served-model-name", MODEL, "--threads", "1", "--kv-cache-gib", "0.5"),
                *("--role", role, "--port", str(port), "--log-level", "warning", *flags),
            ]
            server = stack.enter_context(started(command, f"http://127.0.0.1:{port}"))
            urls.append(server.url)
        yield urls


async def idle(url: str, filler: WordFiller, config: WorkloadConfig) -> tuple[Objectives, float]:
    """Objectives from an idle instance, and requests a second that one core can do."""
    transport = HttpTransport(url)
    try:
        probe = Probe(transport, RequestTarget(MODEL, "completions"), filler, "idle", ids=False)
        shape = generate(config)
        longest = max(turn.new_tokens for turn in shape.turns)
        await warm_up(probe, longest)
        sizes = [turn.new_tokens for turn in shape.turns]
        short = await idle_ttft(probe, [n for n in sizes if n <= SHORT_TOKENS][:20])
        long = await idle_ttft(
            replace(probe, name="idle/long"), [n for n in sizes if n > SHORT_TOKENS][:6]
        )
        assert short is not None
        assert long is not None
        costs = await measure_costs(probe, longest)
        objectives = Objectives(
            SHORT_TOKENS, ttft_short=SLO_FACTOR * short.mean, ttft_long=SLO_FACTOR * long.mean
        )
        return objectives, costs.capacity(shape)
    finally:
        await transport.close()


async def load(url: str, filler: WordFiller, workload: BenchWorkload, seconds: float) -> Any:
    transport = HttpTransport(url)
    try:
        probe = Probe(transport, RequestTarget(MODEL, "completions"), filler, "warm", ids=False)
        await asyncio.gather(*(probe.ask(str(number), 32, 2) for number in range(8)))
        generator = LoadGenerator(
            transport,
            RequestTarget(MODEL, "completions"),
            filler,
            clock=asyncio.get_running_loop().time,
        )
        return await generator.run(workload, seconds)
    finally:
        await transport.close()


def row(name: str, lap: int, report: Report, objectives: Objectives) -> dict[str, Any]:
    short, long, whole = (report.classes[key] for key in ("short", "long", "all"))
    assert short.ttft is not None
    return {
        "router": name,
        "lap": lap,
        "requests": report.sent,
        "errors": report.errors,
        "short_p50": short.ttft.p50,
        "short_p90": short.ttft.p90,
        "short_p99": short.ttft.p99,
        "long_p90": long.ttft.p90 if long.ttft else None,
        "short_violations": 1 - (short.slo_attainment or 0.0),
        "violations": 1 - (whole.slo_attainment or 0.0),
        "requests_per_second": whole.requests_per_second,
        "output_tokens_per_second": whole.output_tokens_per_second,
        "cached_tokens": whole.cached_tokens,
        "send_lag_p99": report.send_lag.p99 if report.send_lag else None,
        "warnings": report.warnings,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over laps."""
    keys = ("short_p50", "short_p90", "long_p90", "short_violations", "violations")
    names = list(dict.fromkeys(each["router"] for each in rows))
    return {
        name: {
            key: statistics.median(each[key] for each in rows if each["router"] == name)
            for key in (*keys, "requests_per_second", "output_tokens_per_second")
        }
        for name in names
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    names = options.routers.split(",")
    config = WorkloadConfig(
        requests=200,
        document_share=options.document_share,
        document_tokens=options.document_tokens,
        think_seconds=1.0,
        output_tokens=(4, 16),
    )
    filler = WordFiller(secrets.token_hex(4), [str(n) for n in range(1, VOCABULARY)], None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        folder = Path(work)
        model = CONFIG | {"hidden_size": options.width, "intermediate_size": 3 * options.width}
        (folder / "config.json").write_text(json.dumps(model))
        roles = options.roles.split(",")
        urls = stack.enter_context(instances(folder, roles, options.stand_in, options.serve))
        objectives, capacity = asyncio.run(idle(urls[0], filler, config))
        cores = len(os.sched_getaffinity(0))
        devices = len(urls) if options.stand_in else min(cores, len(urls))
        rate = options.load * capacity * devices
        print(f"{rate:.2f} requests/s, objectives {objectives}", flush=True)
        candidates = routers(folder, urls, options.venvs, names)
        for lap in range(options.laps):
            count = max(20, round(rate * options.seconds))
            workload = generate(replace(config, rate=rate, seed=lap, requests=count))
            span = workload.sessions[-1].start
            for router in candidates if lap % 2 == 0 else reversed(candidates):
                own = replace(filler, salt=f"{filler.salt}/{router.name}/{lap}")
                with router.up() as url:
                    result = asyncio.run(load(url, own, workload, 2 * span + 60))
                report = summarise(result, objectives)
                rows.append(row(router.name, lap, report, objectives))
                shown = {k: round(v, 3) for k, v in rows[-1].items() if isinstance(v, float)}
                print(router.name, shown, report.errors, report.warnings, flush=True)
    return {
        "benchmark": "routing",
        **describe(),
        "others": [SGLANG_ROUTER, VLLM_ROUTER, ENVOY],
        "model": model,
        "stand_in": options.stand_in,
        "roles": roles,
        "serve_flags": options.serve,
        "rate": rate,
        "load": options.load,
        "objectives": {"short": objectives.ttft_short, "long": objectives.ttft_long},
        "workload": workload.parameters,
        "summary": summary(rows),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument(
        "--routers",
        default="pla-serve auto,pla-serve predicted,pla-serve round-robin,pla-serve least-loaded,"
        "sglang-router cache_aware,vllm-router cache_aware",
    )
    parser.add_argument(
        "--width", type=int, default=512, help="of the model; with 128 the host's time dominates"
    )
    parser.add_argument("--roles", default="short,short,long,long", help="of the instances")
    parser.add_argument("--laps", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals in one run")
    parser.add_argument("--load", type=float, default=0.5, help="share of what there is")
    parser.add_argument("--stand-in", metavar="MACHINE", help="of the simulator; replaces models")
    parser.add_argument("--document-tokens", type=int, nargs=2, default=(1024, 4096))
    parser.add_argument("--document-share", type=float, default=0.15)
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache/pla-serve-routers")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="instances' flags")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no server is left behind
    result = measure(options)
    print(json.dumps(result["summary"], indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
