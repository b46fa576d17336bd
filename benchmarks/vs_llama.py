"""This server against llama.cpp: same machine, same GGUF file, same prompts, same run.

    python benchmarks/vs_llama.py                             # all formats, about 20 minutes
    python benchmarks/vs_llama.py --quick --formats Q8_0

Everything goes over HTTP, as in vs_vllm.py: both servers stay up, the one that is not measured is
stopped with SIGSTOP, they take turns, medians count, prompts are unique. llama-server gets every
core, flash attention and eight slots. The bandwidth of memory is measured with both stopped, and
gives the most tokens a second that a decode step can reach which reads every weight once.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from pathlib import Path

import llama_cpp
import torch
from vs_vllm import CLIENTS, MAX_LENGTH, MODEL, Side, compare, medians, rounds

from pla_serve.bench.save import write_json
from pla_serve.bench.text import load_tokenizer, make_filler
from pla_serve.engine.loading import ConsoleProgress, resolve
from pla_serve.engine.loading.finder import DEFAULT_MODEL
from pla_serve.environment import describe, usable_cores

WANTED = {
    "F32": {"prefill": 1.0, "decode": 1.0, "http": 1.0},
    "BF16": {"prefill": 1.0, "decode": 1.2, "http": 1.0},
    "": {"prefill": 2.0, "decode": 1.3, "http": 1.0},
}
"""Ratios that the project promises, by format (else that of quantised ones) and measurement."""
DTYPES = {"F32": "float32", "BF16": "bfloat16"}
READ_BYTES = 2**30
REPEATS = 7


def ours(file: Path, form: str, flags: list[str]) -> Side:
    command = [sys.executable, "-m", "pla_serve", "serve", "--model", str(file)]
    command += ["--served-model-name", MODEL, "--log-level", "warning"]
    command += ["--dtype", DTYPES[form]] if form in DTYPES else ["--quantization", "keep"]
    return Side("pla-serve", (*command, *flags), None, "/ready")


def theirs(programs: Path, file: Path) -> Side:
    command = [str(programs / "llama-server"), "--model", str(file), "--alias", MODEL]
    command += ["--host", "127.0.0.1", "--threads", str(usable_cores()), "--flash-attn", "on"]
    command += ["--parallel", str(CLIENTS), "--ctx-size", str(CLIENTS * MAX_LENGTH)]
    command += ["--batch-size", "2048", "--ubatch-size", "512", "--no-webui"]
    return Side("llama-server", tuple(command), None, "/health")


def bandwidth() -> float:
    """Bytes a second that all cores read from memory in order, the best of some sums."""
    numbers = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    best = 0.0
    for _ in range(REPEATS):
        started = time.perf_counter()
        numbers.sum()
        best = max(best, READ_BYTES / (time.perf_counter() - started))
    return best


def main() -> None:
    options = parse()
    programs = llama_cpp.prepare()
    folder = resolve(DEFAULT_MODEL, progress=ConsoleProgress()).folder
    filler = make_filler(secrets.token_hex(8), load_tokenizer(folder))
    result: dict = {"formats": {}}
    if options.output.exists():  # formats of earlier runs stay
        result = json.loads(options.output.read_text())
    most_bytes = bandwidth()
    for form in options.formats.split(","):
        file = llama_cpp.model_file(programs, form)
        sides = [ours(file, form, options.ours), theirs(programs, file)]
        found = rounds(sides, filler, options.rounds, options.quick)
        mine, other = (medians(found, side.name) for side in sides)
        wanted = WANTED.get(form, WANTED[""])
        rows = compare(form, mine, other, (sides[0].name, sides[1].name), wanted)
        size = file.stat().st_size
        most = most_bytes / size
        share = mine["decode, batch 1"] / most
        print(f"{form}: {share:.0%} of the {most:.0f} tokens/s that memory allows at batch 1")
        result["formats"][form] = {
            "environment": describe(),
            "llama.cpp": {"package": llama_cpp.VERSION, "version": llama_cpp.version(programs)},
            "bytes_per_second": most_bytes,
            "commands": {side.name: side.shown for side in sides},
            "file_bytes": size,
            "decode_bound": most,
            "decode_share_of_bound": share,
            "medians": rows,
            "rounds": found,
        }
        write_json(options.output, result)
    print(f"saved {options.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", default="Q8_0,Q4_K_M,Q4_0,F32,BF16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer prompts a round")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="flags of our server")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/vs_llama.json"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
