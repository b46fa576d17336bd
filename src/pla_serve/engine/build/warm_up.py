"""Runs a few batches at start, so that predictions of time rest on measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.policy.cost import CostModel
from pla_serve.policy.protocol import Batch, BatchClass, Chunk

WarmUpBatch = tuple[tuple[int, int], ...]
"""New tokens and history of each sequence of a batch."""

WarmUpRun = Callable[[Sequence[SpanRequest]], object]
"""Runs a batch as it will run when requests come."""

BUDGET_SECONDS = 10.0
"""Time that a warm-up may take, roughly."""
LONG_SECONDS = 0.5
"""A batch that takes this long runs once. One-time work is a small part of its time."""


def shapes(chunk: int) -> Iterator[WarmUpBatch]:
    """Yield the batches of a warm-up, as new tokens and history of each sequence.

    These are decode steps, single short prefills, one batch of four short prefills, and single
    chunks of long prefills. Within each kind the small batches come first.

    Args:
        chunk: tokens of a chunk of a long prefill.
    """
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
    """Run each batch of `shapes` twice in a row, and fit ``cost`` to the time of the second run.

    Goes through the batches twice, within about BUDGET_SECONDS. Leaves out batches that do not fit
    into the KV cache, that are longer than the model, or that would take longer than the time that
    is left. Writes to the first KV blocks, so no request may be running.

    Args:
        cost: learns the measured times, and predicts whether there is time for a batch.
        chunk: tokens of a chunk of a long prefill.
        longest: most tokens of a sequence.
        blocks: KV blocks of the cache.
        clock: monotonic seconds.
    """
    deadline = clock() + BUDGET_SECONDS
    for _ in range(2):
        for shape in shapes(chunk):
            wanted = sum(-(-(new + history) // block_tokens) for new, history in shape)
            if wanted > blocks or any(sum(sequence) > longest for sequence in shape):
                continue
            if clock() + 2 * cost.seconds(as_batch(shape)) < deadline:
                seconds = time_batch(run, _spans(shape, block_tokens), device, clock)
                cost.observe(as_batch(shape), seconds)


def as_batch(shape: WarmUpBatch) -> Batch:
    """Return the batch as the cost model knows batches."""
    chunks = tuple(Chunk(str(i), new, history) for i, (new, history) in enumerate(shape))
    return Batch(BatchClass.MIXED, prefills=chunks)


def _spans(shape: WarmUpBatch, block_tokens: int) -> list[SpanRequest]:
    """Return the requests of a batch, with the first KV blocks of the cache."""
    spans: list[SpanRequest] = []
    first = 0
    for new, history in shape:
        count = -(-(new + history) // block_tokens)
        spans.append(SpanRequest([0] * new, history, [(first, first + count)], True))
        first += count
    return spans


def time_batch(
    run: WarmUpRun,
    spans: Sequence[SpanRequest],
    device: torch.device,
    clock: Callable[[], float],
) -> float:
    """Run a batch twice, or once if it is long, and return the seconds of the last run."""
    seconds = 0.0
    for _ in range(2):
        _wait_for(device)
        started = clock()
        run(spans)
        _wait_for(device)
        seconds = clock() - started
        if seconds > LONG_SECONDS:
            break
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
