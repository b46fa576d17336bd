"""Whether every way of running a batch gives the logits of a float32 model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from gpu_parts.bed import BLOCK, Bed, make_bed, write_source
from gpu_parts.report import Report
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.loading import load_config

Way = Callable[[SpanRequest], torch.Tensor]
SLACK = 1.5
FLOOR = 5e-3
"""A way of running passes if its error, as a share of the norm of the logits, is at most SLACK
times that of the stock model in the same type, plus FLOOR."""


def correctness(report: Report, device: torch.device, tiny: bool) -> None:
    """All executors at every edge of every captured size, on random inputs."""
    name, layers = ("tiny", None) if tiny else ("Qwen2.5-7B", 4)
    dtype = torch.float32 if tiny else torch.bfloat16
    bed = make_bed(name, device, dtype, kv_tokens=16384, context=4096, layers=layers)
    most = 64 if tiny else 512
    bed.capture("1x1,8x8,64x4" if tiny else "auto", most, 16)
    assert bed.grid is not None
    reference, stock = _references(name, layers, device, dtype)
    ways: dict[str, Way] = {
        "eager": lambda request: bed.eager([request]),
        "graph": lambda request: _graph(bed, request),
        "chunked": lambda request: _chunked(bed, request),
        "preempted": lambda request: _preempted(bed, request),
    }
    edges = sorted({shape.tokens for shape in bed.grid.shapes})
    lengths = sorted({n for edge in edges for n in (edge - 1, edge, edge + 1) if 1 <= n <= most})
    cases = [(n, h) for n in lengths for h in (0, 77)] + ([(200, 5)] if tiny else [(2047, 1025)])
    worst: dict[str, float] = dict.fromkeys([*ways, "stock"], 0.0)
    failed: list[str] = []
    done = 0
    for number, (new, history) in enumerate(sorted(cases, key=lambda case: (case[0] * 37) % 101)):
        report.check()
        whole = bed.request(history + new, 0, 0, seed=number)
        ids = torch.tensor([list(whole.tokens)], device=device)
        with torch.inference_mode():
            expected = reference(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
            plain = stock(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        norm = expected.norm()
        baseline = float((plain - expected).norm() / norm)
        worst["stock"] = max(worst["stock"], baseline)
        request = SpanRequest(whole.tokens[history:], history, whole.runs, True)
        for label, way in ways.items():
            if label == "graph" and new > most:
                continue
            _poison(bed)
            if history:
                bed.eager([SpanRequest(whole.tokens[:history], 0, whole.runs, True)])
            got = way(request)[0].float()
            error = float((got - expected).norm() / norm)
            worst[label] = max(worst[label], error) if error == error else float("nan")
            if not error <= SLACK * baseline + FLOOR:
                failed.append(f"{label} {new}+{history}: {error:.3g} (stock {baseline:.3g})")
        done += 1
        report.save("worst", worst)
        report.save("failed", failed)
        report.save("cases", done)
    report.row(
        f"logits against float32, {done} lengths",
        ", ".join(f"{label} {error:.1e}" for label, error in worst.items()),
        f"<= {SLACK} x stock + {FLOOR}",
        not failed,
    )
    report.save("replays", dict(bed.grid.counts.replays))
    report.save("fallbacks", dict(bed.grid.counts.fallbacks))


def _references(
    name: str, layers: int | None, device: torch.device, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The stock model with torch's attention in float32, and in the type that is measured.

    The seed of the weights is that of the bed's, and random weights are drawn in its type.
    """
    from pla_serve.engine.loading import load_model

    source = write_source(name, layers)
    stock = load_model(source, dtype, device, 0, attn_implementation="sdpa", checked=True)
    config = copy.deepcopy(load_config(source))
    with device:
        wide = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    wide.load_state_dict({key: value.float() for key, value in stock.state_dict().items()})
    return wide.eval().requires_grad_(False), stock


def _poison(bed: Bed) -> None:
    """Whatever is read before it was written shows."""
    used = min(bed.scratch.first, 8192)
    for memory in (*bed.cache.keys, *bed.cache.values):
        memory[:used].fill_(torch.nan)


def _graph(bed: Bed, request: SpanRequest) -> torch.Tensor:
    assert bed.grid is not None
    logits = bed.grid.forward([request])
    if logits is None:
        raise RuntimeError(f"no shape took {len(request.tokens)} tokens: {bed.grid.counts}")
    return logits


def _chunked(bed: Bed, request: SpanRequest) -> torch.Tensor:
    """Three uneven chunks, the last of them with logits."""
    tokens, history = list(request.tokens), request.history
    cuts = sorted({0, len(tokens) // 3, 2 * len(tokens) // 3 + 1, len(tokens)})
    logits: torch.Tensor | None = None
    for start, end in itertools.pairwise(cuts):
        chunk = SpanRequest(tokens[start:end], history + start, request.runs, True)
        logits = bed.eager([chunk])
    assert logits is not None
    return logits


def _preempted(bed: Bed, request: SpanRequest) -> torch.Tensor:
    """A captured batch, an eager pass or nothing at each layer boundary; other blocks, same KV."""
    assert bed.grid is not None
    free = bed.blocks // 2
    short = bed.request(5, 0, free, seed=1)
    other = bed.request(9, 0, free + 8, seed=2)
    calls = 0

    def at_boundary() -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 1:
            assert bed.grid is not None
            bed.grid.forward([short])
        elif calls % 3 == 2:
            bed.eager([other], lambda: None)

    assert free * BLOCK + 256 < bed.scratch.first
    return bed.eager([request], at_boundary)
