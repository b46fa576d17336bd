"""The Triton kernels against float64, over random shapes in poisoned memory."""

from __future__ import annotations

from math import ceil

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from pla_serve.engine.attention.paged import (
    LEAST_SPLIT,
    LEAST_SPLIT_OF_MANY,
    PagedAttention,
    Tile,
)
from pla_serve.engine.batch.flat import Paged
from tests.engine.attention.problems import make_problem

LENGTHS = st.lists(
    st.tuples(st.sampled_from((1, 2, 3, 4, 5, 15, 16, 17)), st.sampled_from((0, 1, 3, 4, 31, 70))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=LENGTHS,
    heads=st.sampled_from((1, 2)),
    group=st.sampled_from((1, 2, 5, 7)),
    dim=st.sampled_from((16, 24)),
    block=st.sampled_from((4, 16)),
    processors=st.sampled_from((1, 64)),
    padding=st.sampled_from(((0, 0), (5, 0), (9, 3))),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
@example(0, [(1, 300)], 1, 7, 16, 16, 64, (7, 3), torch.float32)  # a decode step, split
@example(0, [(1, 0)] * 4, 2, 1, 16, 4, 1, (0, 0), torch.float32)
@example(0, [(1, 1300), (1, 7), (1, 512)], 1, 2, 16, 16, 1, (5, 2), torch.bfloat16)
def test_equals_float64(
    seed: int,
    lengths: list[tuple[int, int]],
    heads: int,
    group: int,
    dim: int,
    block: int,
    processors: int,
    padding: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    problem = make_problem(
        seed, lengths, heads=heads, group=group, dim=dim, block=block, dtype=dtype, padding=padding
    )
    many = Tile(rows=16, keys=16, warps=4, stages=1)
    backend = PagedAttention(processors, many)
    got = backend.attend(0, problem.query, problem.cache, problem.batch, 0.25)
    assert got.shape == (problem.real + padding[0], heads * group, dim)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(
        got[: problem.real].double(), problem.expected(0.25), rtol=tolerance, atol=tolerance
    )


def test_a_batch_that_was_not_staged_is_refused() -> None:
    problem = make_problem(0, [(3, 0)])
    batch = problem.batch.__class__(
        problem.batch.tokens,
        problem.batch.positions,
        problem.batch.slots,
        problem.batch.outputs,
        problem.batch.spans,
    )
    with pytest.raises(RuntimeError, match="staged"):
        PagedAttention(1).attend(0, problem.query, problem.cache, batch, 1.0)


def programs(contexts: list[int], heads: int, kv_heads: int, most_context: int) -> list[int]:
    """Keys that each program of a decode step reads on an H100, as the kernel divides them.

    Args:
        most_context: what the host knows: the limit of a captured graph.
    """
    processors = 132
    empty = torch.empty(0, dtype=torch.int32)
    paged = Paged(empty, torch.empty(len(contexts)), empty, empty, 16, len(contexts), most_context)
    backend = PagedAttention(processors)
    tile, splits = backend.form(paged, len(contexts), heads // kv_heads, kv_heads, torch.bfloat16)
    many = len(contexts) * kv_heads >= 2 * processors
    least = LEAST_SPLIT_OF_MANY if many else LEAST_SPLIT
    read = []
    for context in contexts:
        tiles = max(ceil(ceil(context / tile.keys) / splits), ceil(least / tile.keys))
        part = tiles * tile.keys
        read += [min(part, context - low) for low in range(0, context, part)] * kv_heads
    return read


@pytest.mark.parametrize(
    ("contexts", "heads", "busy", "longest"),
    [
        ([2000], (28, 4), 60, 192),
        ([2000] * 8, (28, 4), 132, 192),
        ([2000] * 16, (28, 4), 132, 192),
        ([2000] * 32, (32, 8), 132, 512),
        ([500] * 16, (28, 4), 132, 192),
        ([32_768, *[500] * 31], (28, 4), 132, 2048),
        ([32_768, *[500] * 63], (32, 8), 132, 2048),
        ([2000] * 256, (28, 4), 132, 512),
    ],
)
def test_decode_steps_fill_the_device_whatever_the_host_knows(
    contexts: list[int], heads: tuple[int, int], busy: int, longest: int
) -> None:
    """A captured graph gives only the greatest context; the programs that find keys are counted."""
    read = programs(contexts, *heads, most_context=32_768)
    assert len(read) >= busy
    assert max(read) <= longest
    assert sum(read) == sum(contexts) * heads[1]
