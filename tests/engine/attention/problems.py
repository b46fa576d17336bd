"""Random batches in poisoned memory, and what attention must make of them, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch

from pla_serve.engine.batch.flat import FlatBatch, SpanRequest, slot_runs
from pla_serve.engine.batch.staging import Capacity, Scratch, capacity_of, pack, unpack
from pla_serve.engine.kv.blocks import BlockRun, extend_runs
from pla_serve.engine.kv.cache import KVCache, KVShape

CPU = torch.device("cpu")


@dataclass
class Problem:
    """One layer's attention; all memory that belongs to no sequence is NaN."""

    cache: KVCache
    requests: list[SpanRequest]
    batch: FlatBatch
    query: torch.Tensor
    """(heads, tokens of the capacity, dim); NaN in the padding."""
    real: int

    def expected(self, scaling: float) -> torch.Tensor:
        """(real tokens, heads, dim) float64."""
        outputs = []
        for span in self.batch.spans:
            runs = [torch.arange(start, end) for start, end in span.runs]
            slots = torch.cat(runs)
            query = self.query[:, span.start : span.start + span.length].double()
            groups = query.shape[0] // self.cache.shape.heads
            keys = self.cache.keys[0][slots].double().repeat_interleave(groups, 1)
            values = self.cache.values[0][slots].double().repeat_interleave(groups, 1)
            scores = torch.einsum("htd,shd->hts", query, keys) * scaling
            seen = torch.ones(span.length, len(slots), dtype=torch.bool).tril(span.history)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            outputs.append(torch.einsum("hts,shd->thd", weights, values))
        return torch.cat(outputs)


def make_problem(
    seed: int,
    lengths: list[tuple[int, int]],
    *,
    heads: int = 2,
    group: int = 1,
    dim: int = 16,
    block: int = 4,
    dtype: torch.dtype = torch.float32,
    padding: tuple[int, int] = (0, 0),
) -> Problem:
    """``lengths`` are (new tokens, history); ``padding`` is tokens and sequences to spare."""
    rng = Random(seed)
    generator = torch.Generator().manual_seed(seed)
    needed = sum(-(-(new + history) // block) for new, history in lengths)
    blocks = list(range(1, needed + 5))
    rng.shuffle(blocks)
    cache = KVCache(KVShape(1, heads, dim, dtype), (needed + 6) * block, CPU)
    cache.keys[0].fill_(torch.nan)
    cache.values[0].fill_(torch.nan)
    requests = []
    for new, history in lengths:
        runs: list[BlockRun] = []
        extend_runs(runs, [blocks.pop() for _ in range(-(-(new + history) // block))])
        requests.append(SpanRequest([1] * new, history, runs, True))
        for start, end in slot_runs(runs, new + history, block):
            size = (end - start, heads, dim)
            cache.keys[0][start:end] = torch.randn(size, generator=generator).to(dtype)
            cache.values[0][start:end] = torch.randn(size, generator=generator).to(dtype)
    exact = capacity_of(requests, block)
    real = exact.tokens
    capacity = Capacity(
        real + padding[0],
        exact.sequences + padding[1],
        exact.outputs + padding[1],
        exact.entries + 3,
    )
    numbers, spans = pack(requests, capacity, block, Scratch(0, block))
    buffer = torch.full((capacity.size,), 10**6, dtype=torch.int32)  # unused entries lead nowhere
    buffer[: len(numbers)] = torch.from_numpy(numbers)
    batch = unpack(
        buffer,
        capacity,
        spans,
        block,
        most_query=max(new for new, _ in lengths),
        most_context=max(new + history for new, history in lengths),
    )
    query = torch.full((heads * group, capacity.tokens, dim), torch.nan, dtype=dtype)
    query[:, :real] = torch.randn((heads * group, real, dim), generator=generator).to(dtype)
    return Problem(cache, requests, batch, query, real)
