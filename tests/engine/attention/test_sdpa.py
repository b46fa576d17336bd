"""The fast CPU path against the masked reference, and the reference against plain arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pla_serve.engine.attention.sdpa import SdpaCpu, SdpaReference
from pla_serve.engine.batch.flat import FlatBatch, SpanRequest, slot_runs
from pla_serve.engine.batch.staging import DirectUploader, stage
from pla_serve.engine.kv.blocks import BlockRun, extend_runs
from pla_serve.engine.kv.cache import KVCache, KVShape

BLOCK = 4
CPU = torch.device("cpu")


def runs_of(blocks: list[int]) -> list[BlockRun]:
    runs: list[BlockRun] = []
    extend_runs(runs, blocks)
    return runs


def random_batch(rng: Random, heads: int, dim: int) -> tuple[KVCache, FlatBatch]:
    """Spans of all kinds over scattered blocks; the rest of the memory is NaN."""
    blocks = list(range(64))
    cache = KVCache(KVShape(1, heads, dim, torch.float32), len(blocks) * BLOCK, CPU)
    cache.keys[0].fill_(torch.nan)
    cache.values[0].fill_(torch.nan)
    if rng.random() < 0.7:
        rng.shuffle(blocks)
    spans = []
    for _ in range(rng.randint(1, 4)):
        length, history = rng.choice((1, 1, 2, 7, 20)), rng.choice((0, 0, 1, 4, 9, 21))
        own = runs_of([blocks.pop() for _ in range(-(-(length + history) // BLOCK))])
        spans.append(SpanRequest([0] * length, history, own, True))
        for start, end in slot_runs(own, length + history, BLOCK):
            cache.keys[0][start:end] = torch.randn(end - start, heads, dim)
            cache.values[0][start:end] = torch.randn(end - start, heads, dim)
    return cache, stage(spans, BLOCK, DirectUploader())


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), heads=st.sampled_from((1, 2, 3)), groups=st.sampled_from((1, 3)))
def test_cpu_path_equals_reference(seed: int, heads: int, groups: int) -> None:
    rng = Random(seed)
    torch.manual_seed(seed)
    cache, batch = random_batch(rng, heads, 16)
    query = torch.randn(heads * groups, len(batch.tokens), 16)
    fast = SdpaCpu().attend(0, query, cache, batch, 0.2)
    slow = SdpaReference().attend(0, query, cache, batch, 0.2)
    assert fast.shape == (len(batch.tokens), heads * groups, 16)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_reference_by_hand() -> None:
    cache = KVCache(KVShape(1, 1, 2, torch.float32), 8, CPU)
    cache.keys[0][:3, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    cache.values[0][:3, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    batch = stage([SpanRequest([0, 0], 1, [(0, 1)], True)], BLOCK, DirectUploader())
    query = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    output = SdpaReference().attend(0, query, cache, batch, 1.0)[:, 0]
    weight = math.e / (math.e + 1)
    torch.testing.assert_close(output[0], torch.tensor([weight, 1 - weight]))
    torch.testing.assert_close(output[1], torch.tensor([2.0, 2.0]))


@given(
    blocks=st.lists(st.integers(0, 20), min_size=1, max_size=10, unique=True),
    tokens=st.integers(1, 40),
)
def test_runs_name_each_slot_in_order(blocks: list[int], tokens: int) -> None:
    tokens = min(tokens, len(blocks) * BLOCK)
    slots = [block * BLOCK + offset for block in blocks for offset in range(BLOCK)][:tokens]
    runs = slot_runs(runs_of(blocks), tokens, BLOCK)
    assert [slot for start, end in runs for slot in range(start, end)] == slots
    assert all(a[1] != b[0] for a, b in pairwise(runs)), "runs are maximal"
