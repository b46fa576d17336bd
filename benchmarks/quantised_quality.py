"""What quantised weights cost in quality, and whether they are multiplied exactly.

    python benchmarks/quantised_quality.py          # about 15 minutes on two cores

The text is the language reference that every Python brings (`pydoc_data.topics`). For each format:
the perplexity beside that of the float32 model; how often the likeliest next token is the same as
the float32 model's; the same for the stock model of transformers with the floats that the weights
stand for, which says how exact the kernels are; and for llama.cpp with the same file.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import llama_cpp
import numpy as np
import torch
from torch import nn

from pla_serve.bench.save import write_json
from pla_serve.engine.attention.interface import IMPLEMENTATION
from pla_serve.engine.attention.sdpa import SdpaCpu
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import DirectUploader, stage
from pla_serve.engine.build.quantised import load_kept, quantise_at_load
from pla_serve.engine.kernels.open import CpuKernels, open_kernels
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.layers import cpu
from pla_serve.engine.layers.cpu.quantised import QuantisedEmbedding, QuantisedLinear
from pla_serve.engine.loading import (
    ConsoleProgress,
    ModelSource,
    check_supported,
    decoder_layers,
    load_config,
)
from pla_serve.engine.loading.gguf import converted
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.environment import describe

CONTEXT = 512
"""Tokens of one window. Its second half is scored, as llama-perplexity does."""
AT_LOAD = ("int8", "int4")


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of all windows."""

    perplexity: float
    best: torch.Tensor
    """Likeliest next token at each scored position."""
    logits: torch.Tensor
    """Logits of the first window."""


def load(source: ModelSource, form: str, kernels: CpuKernels, attention: str) -> Any:
    assert kernels.quantised is not None
    model = load_kept(source, torch.float32, kernels.quantised, attention)
    if form in AT_LOAD:
        quantise_at_load(model, form, kernels.quantised)
    return model


def engine(source: ModelSource, form: str, kernels: CpuKernels) -> ModelRunner:
    """The model as the engine computes it."""
    model = load(source, form, kernels, IMPLEMENTATION)
    cpu.optimise(model, kernels)
    shape = check_supported(load_config(source))
    memory = KVShape(shape.layers, shape.kv_heads, shape.head_dim, torch.float32)
    cache = KVCache(memory, CONTEXT, torch.device("cpu"))
    return ModelRunner(model, decoder_layers(model, shape.layers), cache, SdpaCpu())


def reference(source: ModelSource, form: str, kernels: CpuKernels) -> Any:
    """The stock model with the floats that the weights stand for."""
    model = load(source, form, kernels, "eager")
    for name, module in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        if isinstance(module, QuantisedEmbedding):
            setattr(model.get_submodule(parent), own, _Embedding(_floats(module.linear)))
        elif isinstance(module, QuantisedLinear):
            made = nn.Linear(1, 1, bias=False)
            made.weight = nn.Parameter(_floats(module), requires_grad=False)
            made.bias = module.bias
            setattr(model.get_submodule(parent), own, made)
    return model


class _Embedding(nn.Module):
    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows[ids]


def _floats(linear: QuantisedLinear) -> torch.Tensor:
    return linear.kernels.rows(linear.matrices, torch.arange(linear.out_features))


def of_engine(runner: ModelRunner, tokens: list[int]) -> torch.Tensor:
    request = SpanRequest(tokens, 0, [(0, CONTEXT // 16)], True)
    batch = stage([request], 16, DirectUploader())
    return runner.forward(replace(batch, outputs=torch.arange(len(tokens))))


@torch.inference_mode()
def of_stock(model: Any, tokens: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def scored(windows: np.ndarray, logits_of: Any) -> Scored:
    losses, best, first = [], [], None
    for window in windows:
        logits = logits_of(window.tolist())[CONTEXT // 2 : -1]
        first = logits if first is None else first
        targets = torch.from_numpy(window[CONTEXT // 2 + 1 :].astype(np.int64))
        losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
        best.append(logits.argmax(1))
    return Scored(float(torch.cat(losses).mean().exp()), torch.cat(best), first)


def of_llama(programs: Path, file: Path, text: Path, count: int) -> tuple[np.ndarray, torch.Tensor]:
    """Windows of the text, and llama.cpp's likeliest tokens at the scored positions."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch, "logits")
        command = [str(programs / "llama-perplexity"), "-m", str(file), "-f", str(text)]
        command += ["-c", str(CONTEXT), "--chunks", str(count), "-b", str(CONTEXT)]
        command += ["--kl-divergence-base", str(made)]
        subprocess.run(command, check=True, capture_output=True)
        content = made.read_bytes()
    assert content[:8] == b"_logits_"
    context, vocabulary, chunks = struct.unpack_from("<iii", content, 8)
    windows = np.frombuffer(content, np.int32, context * chunks, 20).reshape(chunks, context)
    width = 2 * ((vocabulary + 1) // 2) + 4  # a scale and an offset in float32 come first
    rows = np.frombuffer(content, np.uint16, offset=20 + windows.nbytes).reshape(-1, width)
    best = rows[:, 4 : 4 + vocabulary].astype(np.int32).argmax(1)
    return windows, torch.from_numpy(best)


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a == b).float().mean())


def main() -> None:
    options = parse()
    programs = llama_cpp.prepare()
    kernels = open_kernels("auto")
    result: dict = {"environment": describe(), "llama.cpp": llama_cpp.version(programs)}
    result |= {"kernels": kernels.level, "windows": options.windows, "context": CONTEXT}
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text")
        text.write_text("\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")
        rows: dict[str, dict] = {}
        floats: Scored | None = None
        for form in ("F32", *options.formats.split(",")):
            file = llama_cpp.model_file(programs, "F32" if form in AT_LOAD else form)
            windows, llama = of_llama(programs, file, text, options.windows)
            folder = converted(file, ConsoleProgress(), weights=False)
            source = ModelSource(form, folder, "here", kept=file)
            stock = reference(source, form, kernels)
            exact = scored(windows, lambda tokens, model=stock: of_stock(model, tokens))
            del stock
            floats = floats or exact
            runner = engine(source, form, kernels)
            own = scored(windows, lambda tokens, model=runner: of_engine(model, tokens))
            rows[form] = {
                "perplexity": own.perplexity,
                "float32": floats.perplexity,
                "same_as_float32": same(own.best, floats.best),
                "same_as_dequantised": same(own.best, exact.best),
                "different_from_dequantised": int((own.best != exact.best).sum()),
                "positions": len(own.best),
                "largest_difference_of_logits": float((own.logits - exact.logits).abs().max()),
            }
            if form not in AT_LOAD:
                rows[form] |= {
                    "same_as_llama.cpp": same(own.best, llama),
                    "llama.cpp_same_as_dequantised": same(llama, exact.best),
                }
            print(form, rows[form], flush=True)
            write_json(options.output, result | {"formats": rows})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--formats", default="Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_1,Q4_0,int8,int4")
    parser.add_argument("--windows", type=int, default=8)
    output = Path("benchmarks/results/quantised_quality.json")
    parser.add_argument("--output", type=Path, default=output)
    return parser.parse_args()


if __name__ == "__main__":
    main()
