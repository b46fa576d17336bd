"""Tunes the Triton attention kernel at start.

The fastest tile for long prefills is found by trial, and every variant of the kernel that requests
can need is compiled, because a request should not wait for the compiler.
"""

from __future__ import annotations

import logging
from statistics import median

import torch

from pla_serve.engine.attention.paged import (
    FEW_ROWS,
    MANY_ROWS,
    MANY_ROWS_CHOICES,
    SOME_ROWS,
    PagedAttention,
    Tile,
)
from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import DirectUploader, PinnedUploader, stage
from pla_serve.engine.device.marks import CudaDevice
from pla_serve.engine.kv.cache import KVCache, KVShape

log = logging.getLogger(__name__)

TOKENS = 4096
"""Tokens of the prefill that tiles are compared on."""
REPEATS = 5
HISTORIES = (0, 600, 8192)
"""Histories in tokens: contexts that are not split, split into few parts, and into many."""


def tuned(
    shape: KVShape, query_heads: int, block_tokens: int, device: torch.device
) -> PagedAttention:
    """Return a backend with the fastest tile of `MANY_ROWS_CHOICES` that runs on the device."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    found: dict[Tile, float] = {}
    for tile in MANY_ROWS_CHOICES:
        try:
            found[tile] = prefill_seconds(
                PagedAttention(processors, tile), shape, query_heads, block_tokens, device
            )
        except Exception as error:  # the tile needs more shared memory or registers than there are
            log.info("attention tile %s does not run: %s", tile, type(error).__name__)
    best = min(found, key=lambda tile: found[tile], default=MANY_ROWS)
    log.info(
        "attention tile %s; %d tokens in %s ms",
        best,
        TOKENS,
        ", ".join(f"{seconds * 1e3:.2f}" for seconds in found.values()),
    )
    chosen = PagedAttention(processors, best)
    for tokens, history in variants(query_heads // shape.heads):
        prefill_seconds(
            chosen, shape, query_heads, block_tokens, device, tokens=tokens, history=history
        )
    return chosen


def variants(group: int) -> list[tuple[int, int]]:
    """Return sequences, as (new tokens, history), that together need every variant of the kernel.

    A variant is compiled when it is first needed, which takes about a second.

    Args:
        group: query heads of one KV head.
    """
    # The fewest tokens that get each tile: the fewer there are, the more contexts are split.
    some, many = FEW_ROWS.rows // group + 1, 8 * SOME_ROWS.rows // group + 1
    return [(tokens, history) for tokens in (1, some, many) for history in HISTORIES]


@torch.inference_mode()
def prefill_seconds(
    backend: PagedAttention,
    shape: KVShape,
    query_heads: int,
    block_tokens: int,
    device: torch.device,
    *,
    tokens: int = TOKENS,
    history: int = 0,
) -> float:
    """Return the median seconds that the device takes for attention in one layer of a prefill."""
    tracker = CudaDevice(device)
    blocks = -(-(tokens + history) // block_tokens)
    cache = KVCache(
        KVShape(1, shape.heads, shape.head_dim, shape.dtype), blocks * block_tokens, device
    )
    for memory in (*cache.keys, *cache.values):
        memory.normal_()
    query = torch.randn(tokens, query_heads, shape.head_dim, dtype=shape.dtype, device=device)
    uploader = PinnedUploader(tracker) if device.type == "cuda" else DirectUploader()
    batch = stage([SpanRequest([0] * tokens, history, [(0, blocks)], True)], block_tokens, uploader)
    times = []
    for _ in range(REPEATS + 1):
        began = tracker.record()
        backend.attend(0, query.transpose(0, 1), cache, batch, shape.head_dim**-0.5)
        ended = tracker.record()
        ended.wait()
        times.append(ended.seconds_since(began) or 0.0)
    return median(times[1:])
