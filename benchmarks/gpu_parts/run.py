"""The parts of the GPU benchmark in the order of their worth, each within a budget."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gpu_parts import LEAK_SECONDS, executors, kernels, leak, serving, shapes
from gpu_parts.bed import Bed, make_bed
from gpu_parts.environment import ROOT
from gpu_parts.report import Report
from pla_serve.engine.device.marks import device_of
from pla_serve.environment import describe

RIDGE_SIZES = [
    (1, 1, 1.15), (1, 16, 1.15), (1, 64, 1.15), (4, 16, 1.3), (8, 16, 1.3), (4, 64, 1.3),
    (16, 16, 1.3), (1, 256, 1.3), (64, 1, 1.15),
]  # fmt: skip
"""(requests, tokens each, most times the reading of the weights)."""


class Runner:
    """Runs the parts; keeps one model at a time."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.report = report
        self.tiny: bool = options.tiny
        self.device = torch.device(options.device)
        if self.device.type == "cpu" and self.tiny:
            torch.set_num_threads(1)  # a tiny model gains nothing from more
        self.only = set(options.only.split(",")) if options.only else None
        self.ceilings: dict[str, float] = {}
        self.bed: Bed | None = None
        self.scale = serving.TINY if self.tiny else serving.FULL
        self.leak_seconds: float = options.leak_seconds or (1.0 if self.tiny else LEAK_SECONDS)
        self.name = "tiny" if self.tiny else "Qwen2.5-7B"

    def part(self, name: str, seconds: float, work: Any) -> None:
        """With time to build the model, where that part was left out."""
        if self.only is None or name in self.only or name == "ceilings":
            extra = 60.0 if self.only is not None and self.bed is None else 0.0
            self.report.run(name, seconds + extra, work)

    def all(self) -> None:
        """In the order of their worth."""
        self.part("ceilings", 20, self.measure_ceilings)
        if self.device.type == "cuda":
            ceilings = self.ceilings or {"flops": float("nan"), "bytes_per_second": float("nan")}
            self.part(
                "attention",
                75,
                lambda: kernels.attention(
                    self.report, self.device, ceilings["flops"], ceilings["bytes_per_second"]
                ),
            )
        self.part(
            "correctness",
            80,
            lambda: executors.correctness(self.report, self.device, self.tiny),
        )
        self.free()
        self.part("model 7B", 60, lambda: self.build(self.name))
        self.part("shapes 7B", 60, lambda: shapes.grid(self.report, self.need(), self.tiny))
        self.part("shorts 7B", 30, lambda: self.shorts())
        self.part("longs 7B", 40, lambda: self.longs())
        self.part("cost model", 20, lambda: serving.teach(self.need()))
        self.part(
            "preemption",
            60,
            lambda: serving.preemption(self.report, self.need(), self.scale),
        )
        self.part("decode", 45, lambda: serving.decode(self.report, self.need(), self.scale))
        self.part("axes", 75, lambda: serving.axes(self.report, self.need(), self.scale))
        self.part("piecewise", 30, self.piecewise)
        self.part("leak", self.leak_seconds + 5, self.leak)
        for other in ("tiny",) if self.tiny else ("Qwen2.5-14B", "Qwen2.5-32B"):
            self.free()
            self.part(f"other {other}", 60, lambda other=other: self.other(other))

    def measure_ceilings(self) -> None:
        self.ceilings = kernels.ceilings(self.report, device_of(self.device), self.tiny)

    def need(self) -> Bed:
        """The model; made here where its part was left out by ``--only``."""
        if self.bed is None and self.only is not None and "model 7B" not in self.only:
            self.build(self.name)
        if self.bed is None:
            raise RuntimeError("the model was not built")
        return self.bed

    def captured(self) -> Bed:
        """The model with its shapes, captured here where that part was left out."""
        bed = self.need()
        if bed.grid is None:
            bed.capture("1x1,8x8,64x4" if self.tiny else "auto", 64 if self.tiny else 512, 64)
        return bed

    def leak(self) -> None:
        leak.leak(self.report, self.captured(), self.scale, self.leak_seconds)

    def build(self, name: str) -> None:
        tokens, context = (16384, 4096) if self.tiny else (400_000, 65536)
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        if not self.tiny and self.device.type == "cuda":
            tokens = min(tokens, self.most_tokens(name))
        self.bed = make_bed(name, self.device, dtype, kv_tokens=tokens, context=context)
        layers = self.bed.size.layers
        self.report.save("fused", self.bed.fused)
        self.report.save("attention", self.bed.backend_name)
        self.report.row(
            f"{name}: attention, fused layers",
            f"{self.bed.backend_name}, {self.bed.fused} of {layers}",
        )

    def most_tokens(self, name: str) -> int:
        """KV that fits beside the weights, with a tenth to spare for activations and graphs."""
        from gpu_parts.bed import MODELS

        config = MODELS[name]
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        kv = config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
        each = hidden * (2 * hidden + 2 * kv + 3 * config["intermediate_size"])
        weights = 2 * (layers * each + 2 * hidden * config["vocab_size"])
        free = torch.cuda.mem_get_info(self.device)[0] - weights
        total = torch.cuda.get_device_properties(self.device).total_memory
        room = int((free - 0.07 * total) / (layers * kv * 4))
        if room < 2048:
            raise RuntimeError(f"{name} does not fit: room for {room} tokens of KV")
        return room

    def shorts(self) -> None:
        sizes = [(1, 4, 99.0), (2, 8, 99.0)] if self.tiny else RIDGE_SIZES
        shapes.shorts(self.report, self.captured(), self.ceilings["bytes_per_second"], sizes)

    def piecewise(self) -> None:
        tokens = 4 if self.tiny else 64
        shapes.piecewise(self.report, self.need(), self.ceilings["bytes_per_second"], tokens)

    def longs(self) -> None:
        cases = [(256, 0, 0.0), (128, 512, 0.0)] if self.tiny else LONGS
        shapes.longs(self.report, self.need(), self.ceilings["flops"], cases)

    def other(self, name: str) -> None:
        self.build(name)
        bed = self.need()
        bed.capture("1x1,16x1,64x1,64x64,256x4" if not self.tiny else "1x1,8x4", 256, 64)
        sizes = [(1, 1, 1.15), (1, 64, 1.15), (4, 64, 1.3)] if not self.tiny else [(1, 4, 99.0)]
        shapes.shorts(self.report, bed, self.ceilings["bytes_per_second"], sizes)
        tokens = min(8192, bed.scratch.first - 16)
        if not self.tiny and tokens >= 2048:
            shapes.longs(self.report, bed, self.ceilings["flops"], [(tokens, 0, 0.75)])

    def free(self) -> None:
        self.bed = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


LONGS = [(8192, 0, 0.75), (8192, 24576, 0.65)]
"""(new tokens, history, least share of the matrix product's rate)."""


def run(options: argparse.Namespace) -> int:
    """Run the parts that were asked for; return the exit status."""
    began = time.monotonic()
    logging.basicConfig(
        level="INFO", format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout
    )
    folder = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    path = options.output or folder / ("gpu-tiny.json" if options.tiny else "gpu.json")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; try --device cpu --tiny", file=sys.stderr)
        return 2
    content = {
        **describe(),
        "triton": _version("triton"),
        "note": "random weights; every figure of this file was measured in this run",
        "parts": {},
    }
    longer = max(0.0, (options.leak_seconds or 0.0) - LEAK_SECONDS)
    report = Report(path, began + options.seconds + longer, content)
    Runner(options, report).all()
    print(f"\n{report.table()}\n\n{path}, {time.monotonic() - began:.0f} s")
    missed = [row for row in report.rows if row[3] == "MISSED"]
    failed = [
        name for name, part in content["parts"].items() if part["status"].startswith("failed")
    ]  # type: ignore[attr-defined]
    print(f"{len(missed)} targets missed; failed parts: {failed or 'none'}")
    return 1 if failed else 0


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
