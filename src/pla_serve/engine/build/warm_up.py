"""Runs a few batches at start, so that the first predictions of time rest on measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, BatchClass, Chunk

WarmUpBatch = tuple[tuple[int, int], ...]
"""(new tokens, history) of each sequence."""

WarmUpRun = Callable[[Sequence[SpanRequest]], object]
"""Computes a batch as it will be computed when requests come."""

BUDGET_SECONDS = 10.0
LONG_SECONDS = 0.5
"""What takes this long is not dominated by what happens only once: its first time counts."""


def shapes(chunk: int) -> Iterator[WarmUpBatch]:
    """Single prompts, batches of short ones, decode steps and chunks, small ones first."""
    for count in (1, 4, 8):
        yield ((1, 128),) * count
    for tokens in (16, 64, 128, 256):
        yield ((tokens, 0),)
        yield ((tokens, 512),)
    yield ((32, 128),) * 4
    for history in (0, chunk, 3 * chunk):
        yield ((chunk, history),)


def warm_up(
    run: WarmUpRun,
    cost: CostModel,
    *,
    chunk: int,
    longest: int,
    blocks: int,
    block_tokens: int,
    device: torch.device,
    clock: Callable[[], float],
) -> None:
    """Run each shape twice in a row, the second is timed; all within about BUDGET_SECONDS.

    Leaves out what exceeds the KV or has a sequence of more than ``longest`` tokens: a model may
    have no more positions. Leaves out, too, what would take longer than the time that is left, as
    the shapes before it tell. Uses the KV blocks from the first on, before anyone has a claim.
    """
    deadline = clock() + BUDGET_SECONDS
    for _ in range(2):
        for shape in shapes(chunk):
            wanted = sum(-(-(new + history) // block_tokens) for new, history in shape)
            if wanted > blocks or any(sum(sequence) > longest for sequence in shape):
                continue
            if clock() + 2 * cost.seconds(_as_batch(shape)) < deadline:
                _time(run, cost, shape, block_tokens, device, clock)


def _as_batch(shape: WarmUpBatch) -> Batch:
    chunks = tuple(Chunk(str(i), new, history) for i, (new, history) in enumerate(shape))
    return Batch(BatchClass.MIXED, prefills=chunks)


def _time(
    run: WarmUpRun,
    cost: CostModel,
    shape: WarmUpBatch,
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
    for _ in range(2):
        _wait_for(device)
        started = clock()
        run(spans)
        _wait_for(device)
        seconds = clock() - started
        if seconds > LONG_SECONDS:
            break
    cost.observe(_as_batch(shape), seconds)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
