"""Does a server under mixed load with aborts keep what it should give back?

    python benchmarks/leaks.py --tiny --seconds 600 -o benchmarks/results/leaks.json

Starts ``pla-serve serve`` with little KV, and loads it in rounds: prompts short and long, fresh and
with shared beginnings, streamed and not, several choices, grammars, log-probabilities, penalties,
requests that are refused, and clients that go away at any moment. After each round everybody goes
away at once. Then all requests must be gone and all KV blocks free, and what both processes hold
is noted: memory, open files, threads. A line through the last two thirds of these notes tells
whether memory grows; it is flat if even the upper end of the slope's 95% confidence interval, over
an hour, is less than a stated share of the memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from scipy import stats

from pla_serve.bench.servers import free_port, started
from pla_serve.environment import describe

CLIENTS = 12
LOAD_SECONDS = 12.0
"""Of a round, before everybody goes away."""
REST_SECONDS = 30.0
"""By when a server that nobody uses must be at rest."""
SETTLE_SECONDS = 1.0
FLAT = 0.05
"""Growth in an hour as a share of the memory, below which it is flat."""
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Setup:
    """What is served."""

    model: str
    name: str
    flags: tuple[str, ...]
    context: int


@dataclass
class Rest:
    """What the processes hold while nobody wants anything."""

    seconds: float
    """Since the start of the load."""
    rss: dict[str, int]
    files: dict[str, int]
    threads: dict[str, int]


@dataclass
class Trend:
    """A line through what one process held."""

    process: str
    mib: float
    """The last."""
    mib_per_hour: float
    low: float
    high: float
    """95% confidence interval of the slope."""
    share: float
    """``high`` over ``mib``."""
    flat: bool


@dataclass
class Run:
    """What was done and seen."""

    rests: list[Rest] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    peak_mib: dict[str, float] = field(default_factory=dict)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="random weights, made on the spot")
    parser.add_argument("--model", default=SMOLLM2)
    parser.add_argument(
        "--kv-cache-gib", default="0.3", help="of --model; little, so that it runs out"
    )
    parser.add_argument("--serve-args", default="", help="further flags of pla-serve serve")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument(
        "--warm-seconds", type=float, default=120.0, help="of load before, until caches are full"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    environment = describe()
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            setup = tiny(Path(folder))
        else:
            setup = Setup(options.model, "", ("--kv-cache-gib", options.kv_cache_gib), 2048)
        port = free_port()
        command = [
            sys.executable, "-m", "pla_serve", "serve", setup.model, "--port", str(port),
            "--served-model-name", "m", "--max-model-len", str(setup.context),
            *setup.flags, *options.serve_args.split(),
        ]  # fmt: skip
        with started(command, f"http://127.0.0.1:{port}") as server:
            times = (options.warm_seconds, options.seconds)
            run = asyncio.run(
                load(server.url, server.pid, setup, times, random.Random(options.seed))
            )
            served = read_metrics(httpx.get(f"{server.url}/metrics").text)
    trends = [trend(run.rests, name) for name in run.rests[0].rss]
    run.problems += [p for kind in ("files", "threads") for p in grown(run.rests, kind)]
    run.problems += [f"the memory of the {t.process} is not flat" for t in trends if not t.flat]
    content = {
        "environment": environment,
        "model": setup.name or setup.model,
        "seconds": options.seconds,
        "warm_seconds": options.warm_seconds,
        "rounds": len(run.rests),
        "requests": dict(sorted(run.done.items())),
        "server": served,
        "peak_mib": run.peak_mib,
        "flat_below_share_per_hour": FLAT,
        "trends": [asdict(one) for one in trends],
        "problems": run.problems,
        "rests": [asdict(rest) for rest in run.rests],
    }
    tell(content, trends)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return bool(run.problems)


def tell(content: dict[str, Any], trends: list[Trend]) -> None:
    print(f"{content['rounds']} rounds; {content['requests']}; {content['server']}")
    for one in trends:
        print(
            f"{one.process}: {one.mib:.0f} MiB at rest, {one.mib_per_hour:+.1f} MiB/h "
            f"[{one.low:+.1f}, {one.high:+.1f}], at most {one.share:.1%} an hour: "
            + ("flat" if one.flat else "NOT FLAT")
        )
    print("\n".join(content["problems"]) or "nothing leaks")


def tiny(folder: Path) -> Setup:
    """A model of three small layers over bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    spelling = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: i for i, character in enumerate(spelling)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        eos_token_id=256, bos_token_id=None,
    ).save_pretrained(folder)  # fmt: skip
    flags = ("--load-format", "dummy", "--kv-cache-gib", "0.002", "--threads", "1")
    return Setup(str(folder), "3 layers of 32, random weights", flags, 2048)


class Client:
    """Makes requests up. Draws all that it needs from one seed."""

    def __init__(self, rng: random.Random, context: int) -> None:
        self._rng = rng
        self._context = context
        letters = "abcdefghijklmnopqrstuvwxyz"
        # As many as there are common ones in a language. Tokenizers remember thousands of words:
        # texts without words would be taken for a leak until that memory is full.
        self._words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(2000)]
        self._prefixes = [self._text(300) for _ in range(8)]

    def _text(self, length: int) -> str:
        """About so many characters."""
        return " ".join(self._rng.choices(self._words, k=length // 6 + 1))

    def prompt(self) -> str:
        """Short or long, a third of them with a known beginning; beginnings change in time."""
        rng = self._rng
        text = self._text(rng.choice((8, 30, 100, 400, self._context // 2)))
        if rng.random() < 0.33:
            chosen = rng.randrange(len(self._prefixes))
            if rng.random() < 0.1:
                self._prefixes[chosen] = self._text(300)
            text = self._prefixes[chosen] + text[: self._context // 4]
        return text

    def body(self) -> tuple[str, str, dict[str, Any]]:
        """What kind of request it is, its path and its body."""
        rng = self._rng
        body: dict[str, Any] = {
            "model": "m",
            "max_tokens": rng.choice((1, 8, 40, 120)),
            "temperature": rng.choice((0, 0.7, 1.0)),
            "stream": rng.random() < 0.6,
            "ignore_eos": rng.random() < 0.5,
        }
        kind = rng.choice(("plain", "plain", "choices", "grammar", "logprobs", "sampled", "wrong"))
        chat = rng.random() < 0.5
        if kind == "choices":
            body["n"] = rng.randint(2, 4)
        elif kind == "grammar":
            body |= self._grammar()
        elif kind == "logprobs":
            body |= {"logprobs": True, "top_logprobs": 3} if chat else {"logprobs": 3}
        elif kind == "sampled":
            body |= {"top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "stop": [self._text(1)]}
            body |= {"logit_bias": {"5": -3.0}, "frequency_penalty": 0.5, "seed": rng.randrange(99)}
        elif kind == "wrong":
            body |= rng.choice(
                ({"max_tokens": -1}, {"top_p": 7}, {"guided_regex": "("}, {"no_such_field": 1})
            )
        if chat:
            body["messages"] = [{"role": "user", "content": self.prompt()}]
            return kind, "/v1/chat/completions", body
        body["prompt"] = self.prompt()
        return kind, "/v1/completions", body

    def _grammar(self) -> dict[str, Any]:
        """Of a few kinds; one in four was never seen before."""
        rng = self._rng
        fresh = f"a{rng.randrange(10**6)}" if rng.random() < 0.25 else "a"
        schema = {"type": "object", "properties": {fresh: {"type": "integer"}}, "required": [fresh]}
        return rng.choice(
            (
                {"guided_regex": f"[a-{rng.choice('klmnop')}]{{1,9}}{fresh}"},
                {"guided_choice": ["yes", "no", fresh]},
                {"guided_json": schema},
                {"response_format": {"type": "json_object"}},
            )
        )


async def load(
    url: str, pid: int, setup: Setup, times: tuple[float, float], rng: random.Random
) -> Run:
    """Rounds of load and rest: some seconds that do not count, and the others."""
    run = Run()
    client = Client(rng, setup.context)
    processes = members(pid)
    warm = time.monotonic() + times[0]
    while time.monotonic() < warm:
        await one_round(url, client, rng, run, processes)
    began = time.monotonic()
    while time.monotonic() < began + times[1]:
        await one_round(url, client, rng, run, processes)
        problem = await at_rest(url)
        if problem:
            run.problems.append(f"after {time.monotonic() - began:.0f} s: {problem}")
        if members(pid).keys() != processes.keys() or not all(
            process.is_running() for process in processes.values()
        ):
            run.problems.append("a process of the server has ended")
            break
        rest = Rest(
            round(time.monotonic() - began, 1),
            {name: process.memory_info().rss for name, process in processes.items()},
            {name: process.num_fds() for name, process in processes.items()},
            {name: process.num_threads() for name, process in processes.items()},
        )
        run.rests.append(rest)
        print(f"{rest.seconds:.0f} s: {rest.rss} {rest.files} {rest.threads}", flush=True)
    return run


def members(pid: int) -> dict[str, psutil.Process]:
    """The server and its engine, by name."""
    server = psutil.Process(pid)
    found = {"API server": server}
    for child in server.children(recursive=True):
        if "pla_serve.engine.host.process" in " ".join(child.cmdline()):
            found["engine"] = child
    return found


async def one_round(
    url: str,
    client: Client,
    rng: random.Random,
    run: Run,
    processes: dict[str, psutil.Process],
) -> None:
    """Connections of its own, so that none is open at rest."""
    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(
        base_url=url, timeout=60.0, trust_env=False, limits=limits
    ) as http:

        async def one_client() -> None:
            while True:
                await request(http, client, rng, run)

        tasks = [asyncio.create_task(one_client()) for _ in range(CLIENTS)]
        end = time.monotonic() + LOAD_SECONDS
        while time.monotonic() < end:
            await asyncio.sleep(1.0)
            for name, process in processes.items():
                with suppress(psutil.Error):
                    rss = process.memory_info().rss / 2**20
                    run.peak_mib[name] = max(run.peak_mib.get(name, 0.0), round(rss, 1))
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                run.problems.append(f"a client ended: {type(result).__name__}: {result}")


async def request(http: httpx.AsyncClient, client: Client, rng: random.Random, run: Run) -> None:
    """One request, given up at a random moment in two cases of five."""
    kind, path, body = client.body()
    patience = rng.expovariate(1 / 0.5) if rng.random() < 0.4 else 60.0
    try:
        async with asyncio.timeout(patience):
            async with http.stream("POST", path, json=body) as response:
                async for _ in response.aiter_bytes():
                    pass
    except TimeoutError:
        run.done["given up"] += 1
        return
    expected = (400, 422) if kind == "wrong" else (200, 429)
    if response.status_code not in expected:
        run.problems.append(f"{kind}: status {response.status_code}")
    run.done["refused, busy" if response.status_code == 429 else kind] += 1


async def at_rest(url: str) -> str | None:
    """What is still held once nobody is there, after giving it time; None if it is nothing."""
    zero = (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "pla_serve:requests_parked",
    )
    end = time.monotonic() + REST_SECONDS
    while True:
        async with httpx.AsyncClient(trust_env=False) as http:
            found = read_metrics((await http.get(f"{url}/metrics")).text)
        held = {name: found[name] for name in zero if found[name]}
        if not held:
            await asyncio.sleep(SETTLE_SECONDS)
            return None
        if time.monotonic() > end:
            return f"held although nobody is there: {held}"
        await asyncio.sleep(0.2)


SHOWN = (
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "pla_serve:express_batches_total",
    "pla_serve:engine_restarts_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "pla_serve:requests_parked",
)


def read_metrics(text: str) -> dict[str, float]:
    """The metrics that are looked at."""
    found = dict(re.findall(r"^([a-z_:]+)\{[^}]*\} (\S+)$", text, re.MULTILINE))
    return {name: float(found[name]) for name in SHOWN}


def trend(rests: list[Rest], process: str) -> Trend:
    """Least squares over the last two thirds of the rests."""
    late = rests[len(rests) // 3 :]
    mib = [rest.rss[process] / 2**20 for rest in late]
    slope = low = high = float("nan")
    if len(late) > 2:
        fit = stats.linregress([rest.seconds / 3600 for rest in late], mib)
        reach = float(fit.stderr * stats.t.ppf(0.975, len(late) - 2))
        slope, low, high = float(fit.slope), fit.slope - reach, fit.slope + reach
    share = float(high) / mib[-1]
    return Trend(process, mib[-1], slope, float(low), float(high), share, bool(share < FLAT))


def grown(rests: list[Rest], kind: str) -> list[str]:
    """Return a problem for each process that never has as few of these in the last third as it had
    in the second. What is open for a moment, such as a grammar worker's socket, is no leak."""
    third = len(rests) // 3
    problems = []
    for process in rests[0].rss:
        counts = [getattr(rest, kind)[process] for rest in rests]
        if third and min(counts[-third:]) > min(counts[third : 2 * third]):
            problems.append(f"{kind} of the {process} grow: {counts}")
    return problems


if __name__ == "__main__":
    raise SystemExit(main())
