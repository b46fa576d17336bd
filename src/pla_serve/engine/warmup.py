"""Runs a few batches at start, so that the first predictions of time rest on measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pla_serve.engine.forward import SpanRequest, build
from pla_serve.engine.runner import ModelRunner
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, BatchClass, Chunk

Shape = tuple[tuple[int, int], ...]
"""(new tokens, history) of each sequence."""

BUDGET_SECONDS = 10.0


def shapes(chunk: int, most_tokens: int) -> Iterator[Shape]:
    """Single prompts, batches of short ones, decode steps and chunks, small ones first."""
    for count in (1, 4, 8):
        yield ((1, 128),) * count
    for tokens in (16, 64, 128, 256):
        yield ((tokens, 0),)
        yield ((tokens, 512),)
    yield ((32, 128),) * 4
    for history in (0, chunk, 3 * chunk):
        if history + chunk <= most_tokens:
            yield ((chunk, history),)


def warm_up(
    runner: ModelRunner,
    cost: CostModel,
    *,
    chunk: int,
    blocks: int,
    block_tokens: int,
    device: torch.device,
    clock: Callable[[], float],
) -> None:
    """Time each shape twice, of which the second counts; stops after BUDGET_SECONDS.

    Uses the KV blocks from the first on, before anyone has a claim to them.
    """
    begin = clock()
    for _ in range(2):
        for shape in shapes(chunk, blocks * block_tokens):
            if clock() - begin > BUDGET_SECONDS:
                return
            wanted = sum(-(-(new + history) // block_tokens) for new, history in shape)
            if wanted <= blocks:
                _time(runner, cost, shape, block_tokens, device, clock)


def _time(
    runner: ModelRunner,
    cost: CostModel,
    shape: Shape,
    block_tokens: int,
    device: torch.device,
    clock: Callable[[], float],
) -> None:
    spans: list[SpanRequest] = []
    first = 0
    for new, history in shape:
        count = -(-(new + history) // block_tokens)
        spans.append(SpanRequest([0] * new, history, [(first, first + count)], True))
        first += count
    flat = build(spans, block_tokens, device)
    runner.forward(flat)
    started = clock()
    logits = runner.forward(flat)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    del logits
    chunks = tuple(Chunk(str(i), new, history) for i, (new, history) in enumerate(shape))
    cost.observe(Batch(BatchClass.MIXED, prefills=chunks), clock() - started)
