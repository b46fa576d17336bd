"""A packed batch holds what plain arithmetic says, for any requests and any padding."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pla_serve.engine.batch.flat import SpanRequest
from pla_serve.engine.batch.staging import (
    Capacity,
    Scratch,
    capacity_of,
    pack,
    put_carried,
    unpack,
)
from pla_serve.engine.kv.blocks import BlockRun, extend_runs

SCRATCH = Scratch(first=10_000, count=4)


def some_requests(rng: Random, block_tokens: int) -> list[SpanRequest]:
    """Decode steps and prefills over scattered blocks; single tokens may be carried."""
    blocks = list(range(400))
    rng.shuffle(blocks)
    requests = []
    for row in range(rng.randint(0, 6)):
        length, history = rng.choice((1, 1, 2, 9, 30)), rng.choice((0, 1, 15, 16, 40))
        spare = rng.randint(0, 1)
        count = -(-(length + history) // block_tokens) + spare
        own = [blocks.pop() for _ in range(count)]
        if rng.random() < 0.5:
            own.sort()
        runs: list[BlockRun] = []
        extend_runs(runs, own)
        tokens = [rng.randrange(1000) for _ in range(length)]
        carried = row if length == 1 and rng.random() < 0.5 else None
        requests.append(SpanRequest(tokens, history, runs, rng.random() < 0.7, carried))
    return requests


@given(seed=st.integers(0, 2**32), block_tokens=st.sampled_from((1, 4, 16)), padded=st.booleans())
def test_a_batch_comes_out_as_it_went_in(seed: int, block_tokens: int, padded: bool) -> None:
    rng = Random(seed)
    requests = some_requests(rng, block_tokens)
    need = capacity_of(requests, block_tokens)
    extra = [rng.randint(0, 5) for _ in range(4)] if padded else [0] * 4
    capacity = Capacity(
        need.tokens + extra[0],
        need.sequences + extra[1],
        need.outputs + extra[2],
        need.entries + extra[3],
    )
    numbers, spans = pack(requests, capacity, block_tokens, SCRATCH)
    buffer = torch.zeros(capacity.size, dtype=torch.int32)
    buffer[: len(numbers)] = torch.from_numpy(numbers)
    chosen = torch.arange(2000, 2000 + len(requests))
    if requests:
        put_carried(buffer, capacity, chosen)
    batch = unpack(buffer, capacity, spans, block_tokens, most_query=30, most_context=70)

    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    outputs: list[int] = []
    paged = batch.paged
    assert paged is not None
    for index, (request, span) in enumerate(zip(requests, spans, strict=True)):
        length, context = len(request.tokens), request.history + len(request.tokens)
        blocks = [block for first, end in request.runs for block in range(first, end)]
        own = [block * block_tokens + i for block in blocks for i in range(block_tokens)][:context]
        assert (span.start, span.length, span.history) == (len(tokens), length, request.history)
        assert [slot for first, end in span.runs for slot in range(first, end)] == own
        assert (paged.query_starts[index], paged.contexts[index]) == (len(tokens), context)
        first = int(paged.table_starts[index])
        used = -(-context // block_tokens)
        assert paged.table[first : first + used].tolist() == blocks[:used]
        tokens += request.tokens if request.carried is None else [2000 + request.carried]
        positions += range(request.history, context)
        slots += own[request.history :]
        if request.wants_logits:
            outputs.append(len(tokens) - 1)
    count = len(tokens)
    assert batch.tokens.tolist() == tokens + [0] * extra[0]
    assert batch.positions.tolist() == positions + [0] * extra[0]
    assert batch.slots[:count].tolist() == slots
    assert all(SCRATCH.first <= s < SCRATCH.first + SCRATCH.count for s in batch.slots[count:])
    assert batch.outputs.tolist() == outputs + [0] * extra[2]
    assert paged.query_starts[len(requests) :].tolist() == [count] * (extra[1] + 1)
    assert paged.contexts[len(requests) :].tolist() == [0] * extra[1]


def test_a_batch_that_does_not_fit_is_refused() -> None:
    request = SpanRequest([1, 2, 3], 0, [(0, 1)], True)
    with pytest.raises(ValueError, match="does not fit"):
        pack([request], Capacity(2, 1, 1, 1), 4, SCRATCH)
