"""Captured short batches against reading the weights, and long prefills against products."""

from __future__ import annotations

from typing import Any

import torch

from gpu_parts.bed import Bed
from gpu_parts.report import Report
from pla_serve.engine.attention.interface import ForwardContext
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import stage
from pla_serve.engine.device.capture import CudaCapture, NoCapture
from pla_serve.engine.layers.gpu import GpuLayer
from pla_serve.engine.loading import decoder_layers

MANY = 10


def grid(report: Report, bed: Bed, tiny: bool) -> None:
    """What it takes to capture all shapes."""
    seconds = bed.capture("1x1,8x8,64x4" if tiny else "auto", 64 if tiny else 512, 64)
    assert bed.grid is not None
    gib = bed.grid.bytes_held() / 2**30
    count = len(bed.grid.shapes)
    report.save("capture", {"shapes": count, "seconds": seconds, "gib": gib})
    report.save("failed", dict(bed.grid.counts.fallbacks))
    report.row(
        f"{bed.name}: {count} shapes captured",
        f"{seconds:.1f} s, {gib:.2f} GiB",
        "<= 15 s and <= 1.5 GiB",
        seconds <= 15 and gib <= 1.5 and count > 0,
    )


def shorts(report: Report, bed: Bed, bandwidth: float, sizes: list[tuple[int, int, float]]) -> None:
    """``sizes`` are (requests, tokens each, target); a graph against eager kernels."""
    assert bed.grid is not None
    floor = bed.weight_bytes / bandwidth
    report.save("weight_seconds", floor)
    for batch, tokens, target in sizes:
        report.check()
        blocks = -(-tokens // 16)
        requests = [bed.request(tokens, 0, i * blocks, seed=i) for i in range(batch)]
        if bed.grid.forward(requests) is None:
            report.row(f"{bed.name}: {batch} x {tokens}", f"no shape: {bed.grid.counts.fallbacks}")
            continue
        played = bed.seconds(lambda requests=requests: bed.grid.forward(requests), repeats=15)  # type: ignore[misc, union-attr]
        in_row = bed.seconds(lambda requests=requests: _many(bed, requests), repeats=5) / MANY  # type: ignore[misc]
        eager = bed.seconds(lambda requests=requests: bed.eager(requests))  # type: ignore[misc]
        ratio = in_row / floor
        report.save(
            f"{batch}x{tokens}",
            {"graph": in_row, "graph_alone": played, "eager": eager, "ratio": ratio},
        )
        report.row(
            f"{bed.name}: captured {batch} x {tokens}",
            f"{in_row * 1e3:.2f} ms = {ratio:.2f} x weights; one alone, with the host's part, "
            f"{played * 1e3:.2f} ms; eager {eager * 1e3:.2f} ms",
            f"<= {target} x weights",
            ratio <= target,
        )


def _many(bed: Bed, requests: list[SpanRequest]) -> None:
    """One behind the other, so that the host's part hides behind the device's."""
    assert bed.grid is not None
    for _ in range(MANY):
        bed.grid.forward(requests)


@torch.inference_mode()
def piecewise(report: Report, bed: Bed, bandwidth: float, tokens: int) -> None:
    """One prompt by graphs that leave attention outside, as engines do whose attention cannot be
    captured; against one graph with attention inside."""
    stack = decoder_layers(bed.model, bed.size.layers)
    layers = [layer for layer in stack if isinstance(layer, GpuLayer)]
    if len(layers) < len(stack):
        report.row(f"{bed.name}: piecewise capture", "not measured: layers are not fused")
        return
    request = bed.request(tokens, 0, 0)
    whole_model: Any = bed.model
    core = whole_model.model
    batch = stage([request], 16, bed.uploader)
    context = ForwardContext(batch, bed.cache, bed.backend)
    hidden = core.embed_tokens(batch.tokens).unsqueeze(0).clone()
    angles = core.rotary_emb(hidden, batch.positions.unsqueeze(0))
    heads = layers[0].heads
    attended = hidden.new_zeros(tokens, heads.query, heads.dim)

    def piece(index: int) -> torch.Tensor:
        if index == 0:
            hidden[0].copy_(core.embed_tokens(batch.tokens))
        else:
            layers[index - 1].finish(hidden[0], attended)
        if index < len(layers):
            return layers[index].queries(hidden[0], angles, context)
        logits: torch.Tensor = whole_model.lm_head(core.norm(hidden[:, -1:]))[0]
        return logits

    capturer = CudaCapture(hidden.device) if hidden.is_cuda else NoCapture()
    plays = []
    for index in range(len(layers) + 1):
        report.check()
        plays.append(capturer.capture(lambda index=index: piece(index)))  # type: ignore[misc]

    def play() -> torch.Tensor:
        for index, layer in enumerate(layers):
            queries = plays[index]()
            attended.copy_(bed.backend.attend(index, queries, bed.cache, batch, layer.scaling))
        return plays[-1]()

    expected = bed.eager([request])
    error = float((play() - expected).float().norm() / expected.float().norm())
    seconds = bed.seconds(play, repeats=15)
    report.save("piecewise", {"tokens": tokens, "seconds": seconds, "error": error})
    report.row(
        f"{bed.name}: piecewise capture, 1 x {tokens}",
        f"{seconds * 1e3:.2f} ms = {seconds / (bed.weight_bytes / bandwidth):.2f} x weights",
        "the same logits as eager",
        error <= 2e-2,
    )


def longs(report: Report, bed: Bed, flops: float, cases: list[tuple[int, int, float]]) -> None:
    """``cases`` are (new tokens, history, target); eager layers, the host bounded as in serving."""
    for tokens, history, target in cases:
        report.check()
        request = bed.request(tokens, history, 0)
        # History is random bits of earlier passes or nothing; no arithmetic depends on its values.
        for memory in (*bed.cache.keys, *bed.cache.values):
            memory[: history + tokens].normal_()
        seconds = bed.seconds(
            lambda request=request: bed.eager([request], lambda: None),  # type: ignore[misc]
            repeats=3,
            warm=1,
        )
        share = bed.flops(tokens, history) / seconds / flops
        report.save(f"{tokens}+{history}", {"seconds": seconds, "share": share})
        report.row(
            f"{bed.name}: prefill {tokens} on {history}",
            f"{seconds * 1e3:.1f} ms, {share:.2f} of the product ceiling",
            f">= {target}",
            share >= target,
        )
