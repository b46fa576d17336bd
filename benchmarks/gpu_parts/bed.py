"""A model with random weights, its KV, its kernels and its captured shapes: what is measured."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pla_serve.engine.attention.choose import choose_backend
from pla_serve.engine.attention.interface import IMPLEMENTATION, AttentionBackend
from pla_serve.engine.attention.padded import PaddedAttention
from pla_serve.engine.attention.sdpa import SdpaCpu
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import (
    DirectUploader,
    PinnedUploader,
    Scratch,
    Uploader,
    stage,
)
from pla_serve.engine.build.device import RankDevice
from pla_serve.engine.build.roofline import ModelSize, measure, starting_profile
from pla_serve.engine.build.shapes import capture_all
from pla_serve.engine.device.capture import Capturer, CudaCapture, NoCapture
from pla_serve.engine.device.marks import Device, device_of
from pla_serve.engine.device.run_ahead import RunAhead
from pla_serve.engine.kv.cache import KVCache, KVShape
from pla_serve.engine.layers import gpu
from pla_serve.engine.layers.gpu.operations import TorchOperations
from pla_serve.engine.loading import check_supported, decoder_layers, load_config, load_model
from pla_serve.engine.loading.source import ModelSource
from pla_serve.engine.run.executor import BatchExecutor
from pla_serve.engine.run.graphs.grid import GridLimits, ShapeGrid
from pla_serve.engine.run.runner import ModelRunner
from pla_serve.policy.cost import CostModel
from pla_serve.policy.shapes.choice import choose_shapes

BLOCK = 16
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "initializer_range": 0.02,
    "eos_token_id": 151645,
}
"""What the published Qwen2.5 configs have in common; positions are as many as are measured."""
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B": {
        **QWEN,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "Qwen2.5-14B": {
        **QWEN,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "Qwen2.5-32B": {
        **QWEN,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
    },
    "tiny": {
        **QWEN,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "eos_token_id": 0,
        "initializer_range": 0.1,
        "max_position_embeddings": 4096,
    },
}


@dataclass
class Bed:
    """Everything for one model on one device."""

    name: str
    model: torch.nn.Module
    runner: ModelRunner
    cache: KVCache
    backend_name: str
    backend: AttentionBackend
    cost: CostModel
    size: ModelSize
    uploader: Uploader
    device: Device
    scratch: Scratch
    context: int
    fused: int
    grid: ShapeGrid | None = None

    @property
    def blocks(self) -> int:
        """KV blocks that sequences may use."""
        return self.scratch.first // BLOCK

    @property
    def weight_bytes(self) -> int:
        """Read in one pass over few tokens: all layers and the output matrix."""
        return (self.size.layer_parameters + self.size.head_parameters) * self.size.bytes_each

    def flops(self, tokens: int, history: int, outputs: int = 1) -> float:
        """Operations of a prefill: two a parameter and token, and four a pair in attention."""
        pairs = tokens * history + tokens * (tokens + 1) / 2
        return (
            2 * self.size.layer_parameters * tokens
            + 2 * self.size.head_parameters * outputs
            + 4 * self.size.layers * self.size.attention_width * pairs
        )

    def executor(self, graphs: bool = True) -> BatchExecutor:
        """Where batches run, with or without captured shapes."""
        grid = self.grid if graphs else None
        return BatchExecutor(self.runner, grid, self.uploader, self.device, BLOCK)

    def capture(self, shapes: str, most_tokens: int, most_batch: int) -> float:
        """Capture these shapes in place of earlier ones; returns the seconds it took."""
        limits = GridLimits(BLOCK, self.scratch, self.context, most_tokens, 1.0)
        price = RankDevice(
            self.device, self.uploader, None, self.cost, self.cost, None, False
        ).capture_seconds
        chosen = choose_shapes(shapes, most_tokens=most_tokens, most_batch=most_batch, cost=price)
        torch_device = self.device.torch_device
        capturer: Capturer = CudaCapture(torch_device) if self.device.asynchronous else NoCapture()
        self.grid = None
        began = time.perf_counter()
        self.grid = ShapeGrid(
            self.runner, capturer, self.uploader, chosen, price, limits, torch_device
        )
        capture_all(self.grid, len(chosen))
        self.device.record().wait()
        return time.perf_counter() - began

    def request(
        self, tokens: int, history: int, first_block: int, seed: int = 0, logits: bool = True
    ) -> SpanRequest:
        """Random new tokens of a sequence whose blocks begin at ``first_block``."""
        rng = random.Random(seed)
        vocabulary = int(self.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
        numbers = [rng.randrange(1, vocabulary) for _ in range(history + tokens)][history:]
        count = -(-(tokens + history) // BLOCK)
        if first_block + count > self.blocks:
            raise ValueError(f"{first_block + count} KV blocks are wanted, {self.blocks} are there")
        return SpanRequest(numbers, history, [(first_block, first_block + count)], logits)

    def eager(
        self, requests: Sequence[SpanRequest], at_boundary: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """On the ordinary kernels."""
        return self.runner.forward(stage(requests, BLOCK, self.uploader), at_boundary)

    def seconds(self, work: Callable[[], object], repeats: int = 5, warm: int = 2) -> float:
        """Median time of a piece of work, the host's part included if it is the longer one."""
        for _ in range(warm):
            work()
        times = []
        for _ in range(repeats):
            self.device.record().wait()
            began = time.perf_counter()
            work()
            self.device.record().wait()
            times.append(time.perf_counter() - began)
        return median(times)


def write_source(name: str, layers: int | None = None) -> ModelSource:
    """A folder with the config of a model whose weights will be random."""
    folder = Path(tempfile.mkdtemp(prefix="pla-serve-"))
    content = dict(MODELS[name])
    if layers is not None:
        content["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return ModelSource(name=name, folder=folder, origin="random", dummy=True)


def make_bed(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    kv_tokens: int,
    context: int,
    layers: int | None = None,
    fuse: bool = True,
) -> Bed:
    """Random weights, KV for so many tokens, the best attention, no shapes yet."""
    source = write_source(name, layers)
    config = load_config(source)
    attention = check_supported(config)
    model = load_model(source, dtype, device, 0, attn_implementation=IMPLEMENTATION, checked=True)
    stack = decoder_layers(model, attention.layers)
    shape = KVShape(attention.layers, attention.kv_heads, attention.head_dim, dtype)
    width = attention.query_heads * attention.head_dim
    size = ModelSize.of(
        model, stack, attention_width=width, kv_bytes_per_token=shape.bytes_per_token
    )
    fused = 0
    if device.type == "cpu":
        # The GPU's layers with torch's operations: what differs there is the kernels alone.
        fused = gpu.optimise(model, TorchOperations())
    elif fuse:
        fused = gpu.optimise(model, gpu.best_operations())
    chosen, backend = choose_backend("auto", shape, attention.query_heads, BLOCK, device)
    if isinstance(backend, SdpaCpu):
        backend = PaddedAttention(backend)
    tracker = device_of(device)
    scratch = Scratch(kv_tokens // BLOCK * BLOCK, BLOCK)
    cache = KVCache(shape, scratch.first + BLOCK, device)
    ahead = RunAhead(tracker, 2) if tracker.asynchronous else None
    runner = ModelRunner(model, stack, cache, backend, ahead)
    cost = CostModel(starting_profile(size, measure(device, dtype, time.perf_counter)))
    uploader: Uploader = PinnedUploader(tracker) if tracker.asynchronous else DirectUploader(device)
    return Bed(
        name, model, runner, cache, chosen, backend, cost, size, uploader, tracker, scratch,
        context, fused,
    )  # fmt: skip


def with_logits(request: SpanRequest, wanted: bool) -> SpanRequest:
    """The same with or without logits."""
    return replace(request, wants_logits=wanted)
