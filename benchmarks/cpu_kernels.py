"""Forward passes on one thread, by level of CPU kernels (`--cpu-kernels`) and dtype.

    python benchmarks/cpu_kernels.py
    python benchmarks/cpu_kernels.py --levels avx512,torch --dtypes float32

Seconds are processor time of the thread, the best of a few runs, so that other processes on the
machine cost little. Each level and dtype is a process of its own, which holds torch and oneDNN to
the level too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from pla_serve.bench.save import write_json
from pla_serve.engine.kernels.levels import limits_of_torch, runnable_levels
from pla_serve.environment import describe

PASSES = {
    "prefill 256": (256, 0, 1, 6),
    "prefill 1,024": (1024, 0, 1, 3),
    "prefill 128 after 31,744": (128, 31744, 1, 2),
    "decode, batch 1": (1, 128, 1, 25),
    "decode, batch 8": (1, 128, 8, 12),
}
"""New tokens and history of each sequence, sequences, and runs."""
BLOCK = 16
SLOTS = 32768
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=1073741824"
    ":glibc.malloc.mmap_threshold=1073741824"
}
"""As the engine process has it."""


def measure(model: str, level: str, dtype_name: str) -> dict[str, float]:
    """Tokens a second of each pass, on one thread of this process."""
    import torch

    from pla_serve.engine.attention.interface import IMPLEMENTATION
    from pla_serve.engine.attention.vector import attention_of
    from pla_serve.engine.batch.flat import SpanRequest
    from pla_serve.engine.batch.staging import DirectUploader, stage
    from pla_serve.engine.kernels.open import open_kernels
    from pla_serve.engine.kv.cache import KVCache, KVShape
    from pla_serve.engine.layers import cpu
    from pla_serve.engine.loading import (
        NoLoadingProgress,
        check_supported,
        decoder_layers,
        load_config,
        load_model,
        resolve,
    )
    from pla_serve.engine.run.runner import ModelRunner

    torch.set_num_threads(1)
    device, dtype = torch.device("cpu"), getattr(torch, dtype_name)
    source = resolve(model, "auto", progress=NoLoadingProgress())
    shape = check_supported(load_config(source))
    module = load_model(source, dtype, device, 0, attn_implementation=IMPLEMENTATION, checked=True)
    kernels = open_kernels(level)
    layers = decoder_layers(module, shape.layers)
    cpu.optimise(module, kernels)
    cache = KVCache(KVShape(shape.layers, shape.kv_heads, shape.head_dim, dtype), SLOTS, device)
    runner = ModelRunner(module, layers, cache, attention_of(kernels))
    rates = {}
    for name, (new, history, sequences, runs) in PASSES.items():
        blocks = -(-(new + history) // BLOCK)
        requests = [
            SpanRequest([5] * new, history, [(i * blocks, (i + 1) * blocks)], True)
            for i in range(sequences)
        ]
        batch = stage(requests, BLOCK, DirectUploader())
        seconds = []
        for _ in range(runs):
            started = time.thread_time()
            runner.forward(batch)
            seconds.append(time.thread_time() - started)
        rates[name] = new * sequences / min(seconds)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    known = ",".join([level.name for level in runnable_levels()] + ["torch"])
    parser.add_argument("--levels", default=known)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_kernels.json"))
    parser.add_argument("--one", nargs=2, metavar=("LEVEL", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, *options.one)))
        return
    environment_of_machine = describe()
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in options.dtypes.split(","):
        for level in options.levels.split(","):
            command = [sys.executable, __file__, "--model", options.model, "--one", level, dtype]
            environment = os.environ | ENVIRONMENT | limits_of_torch(level)
            shown = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            rates = json.loads(shown.stdout.splitlines()[-1])
            found.setdefault(dtype, {})[level] = rates
            line = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
            print(f"{dtype}, {level}: {line}", flush=True)
            result = {
                "environment": environment_of_machine,
                "model": options.model,
                "unit": "tokens a second of processor time, one thread",
                "rates": found,
            }
            write_json(options.output, result)  # each time, so that a run can be cut short


if __name__ == "__main__":
    main()
